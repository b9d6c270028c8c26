"""From a checkpoint back to a model, and on to an exported folder."""

import shutil

import pytest
import torch
import yaml
from training.helpers import Interrupt, callback

from tpcompress.export import load, verify
from tpcompress.insertion.attach import record
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.checkpoints import read as state
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.recipe.export import export_free, export_run

GATE = {"pruner": {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}, "keep_tokens": 16}
LORA = {"lora": {"r": 4, "lora_dropout": 0.2}, "train": ["projector"]}


def batch_of(run) -> dict:
    batch = next(iter(run.datamodule.train_dataloader()))
    return {k: v for k, v in batch.items() if k not in ("meta", "labels")}


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    with record(model) as trace:
        out = model.eval()(**batch).logits
    assert {min(16, n) for n in trace.stages[0].total} == set(trace.stages[0].vision_out)
    return out


@pytest.fixture
def unfinished(work):
    with pytest.raises(KeyboardInterrupt):
        work.fit(trainer={"callbacks": [callback(Interrupt, batch=1)]})
    return work


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"plan": GATE},
        LORA | {"schedule": {"class_path": "Linear"}, "teacher": "AdapterOff", "losses": ["Label", "KL"]},
        pytest.param(
            {"plan": {"pruner": "fastv", "layer": 2, "keep_tokens": 16}, "attention": "eager"}, marks=pytest.mark.slow
        ),
        pytest.param({"train": ["projector"], "plan": {"pruner": "random", "keep_tokens": 16}}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_becomes_the_model_that_was_trained(work, model):
    run = work.fit(model=model)
    batch = batch_of(run)
    trained = load_trained(work.folder / "run")
    assert not trained.model.training
    assert torch.equal(logits(trained.model, batch), logits(run.model.model, batch))
    assert trained.recipe == yaml.safe_load((work.folder / "run/recipe.yaml").read_text())
    assert trained.trained_with["arm"] == "training_aware"
    assert trained.trained_with["steps"] == 3
    assert trained.trained_with["base"] == str(work.base)
    assert trained.processor.image_token == "<image>"


def test_an_unfinished_run_must_be_allowed(unfinished):
    with pytest.raises(
        ValueError, match=r"^This run stopped at step 2 of 3; finish it with[^\n]*--allow-unfinished[^\n]*$"
    ):
        load_trained(unfinished.folder / "run")
    assert load_trained(unfinished.last(), allow_unfinished=True).trained_with["steps"] == 2


def test_checkpoints_that_cannot_be(work, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^No checkpoint at \S*gone; give a .ckpt file or the folder of a run.$"
    ):
        load_trained(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"^No checkpoint at \S*last.ckpt;"):
        load_trained(tmp_path)
    work.fit()
    whole = work.last().read_bytes()
    broken = tmp_path / "broken.ckpt"
    middle = len(whole) // 2
    for damaged in (whole[:middle], b"", b"nonsense", whole[:middle] + b"\xff" * 4096 + whole[middle + 4096 :]):
        broken.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^\S*broken.ckpt is damaged \(\w+\); use an earlier checkpoint.$"):
            load_trained(broken)
    for foreign in ({"state_dict": {}}, [1, 2], torch.zeros(2)):
        torch.save(foreign, broken)
        with pytest.raises(ValueError, match=r"^\S*broken.ckpt is not a tpcompress checkpoint;[^\n]*$"):
            load_trained(broken)
    torch.save(torch.nn.Linear(2, 2), broken)  # code, which is not run
    with pytest.raises(ValueError, match="is damaged"):
        load_trained(broken)
    saved = work.saved()
    saved["state_dict"].popitem()
    torch.save(saved, broken)
    with pytest.raises(ValueError, match=r"^The checkpoint lacks 1 of the \d+ weights that train here,[^\n]*$"):
        load_trained(broken)


def test_a_checkpoint_of_deepspeed_is_gathered_first(work, tmp_path, monkeypatch):
    run = work.fit()
    folder = tmp_path / "sharded/checkpoints/last.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    gathered = []

    def gather(path, out):
        gathered.append(path)
        return work.saved()

    monkeypatch.setattr("lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict", gather)
    assert state.checkpoint_file(tmp_path / "sharded") == state.checkpoint_file(folder) == folder
    batch = batch_of(run)
    assert torch.equal(logits(load_trained(folder).model, batch), logits(run.model.model, batch))
    assert gathered == [folder]


# ------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("model", [pytest.param({}, marks=pytest.mark.slow), LORA, {"plan": GATE}])
def test_a_run_is_exported_and_loads_as_it_was_trained(work, model, tmp_path):
    run = work.fit(model=model)
    folder = export_run(work.folder / "run", tmp_path / "out")
    assert verify(folder).ok
    batch = batch_of(run)
    before = logits(run.model.model, batch)
    after = logits(load(folder), batch)
    if "lora" in model:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(after, before)
    assert "keep_tokens: 16" in (folder / "recipe.yaml").read_text()
    with pytest.raises(FileExistsError, match=r"^[^\n]*out[^\n]*$"):
        export_run(work.folder / "run", tmp_path / "out")
    export_run(work.folder / "run", tmp_path / "out", overwrite=True)


@pytest.mark.slow
def test_runs_that_are_not_exported(work, unfinished, tmp_path):
    with pytest.raises(ValueError, match="^This run stopped at step 2 of 3"):
        export_run(unfinished.last(), tmp_path / "out")
    assert verify(export_run(unfinished.last(), tmp_path / "out", allow_unfinished=True)).ok


def test_a_plan_without_training_is_exported(work, tmp_path):
    recipe = work.recipe(model={"plan": {"pruner": "divprune", "keep_tokens": 16}})
    assert verify(export_free(str(work.base), recipe, tmp_path / "out")).ok
    plan = tmp_path / "plan.yaml"
    plan.write_text(PruningPlan.of(recipe).to_yaml())
    assert PruningPlan.of(plan).to_dict() == PruningPlan.of(recipe).to_dict()
    gate = work.recipe("gate", model={"plan": GATE})
    with pytest.raises(ValueError, match=r"^Pruner 'learned_gate' has weights to train;[^\n]*$"):
        export_free(str(work.base), gate, tmp_path / "gate")
    dense = work.recipe("dense", model={"plan": None})
    with pytest.raises(ValueError, match=r"has no model.plan: it trains the dense model.$"):
        export_free(str(work.base), dense, tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match="^No plan at"):
        PruningPlan.of(tmp_path / "gone.yaml")
    plan.write_text("stages: [")
    with pytest.raises(ValueError, match=r"^\S*plan.yaml is not YAML[^\n]*$"):
        PruningPlan.of(plan)
    shutil.rmtree(tmp_path / "out")
