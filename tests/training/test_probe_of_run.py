"""The model that is exported is compared with the one that trained, in the process in which it trained."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tpcompress.export import verify
from tpcompress.export.trained_probe import TrainedProbe, check_reload, record_trained
from tpcompress.models import load_base
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.recipe.export import export_run

LORA = {"lora": {"r": 4}, "train": ["projector"]}


@pytest.mark.parametrize(
    ("model", "trainer"),
    [
        (LORA, {}),
        pytest.param(LORA | {"dtype": "bfloat16"}, {"precision": "bf16-mixed"}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16"}, {"precision": "bf16-true"}, marks=pytest.mark.slow),
        pytest.param({"plan": {"pruner": {"type": "random", "resample": True}, "keep_tokens": 9}}, {},
                     marks=pytest.mark.slow),
        pytest.param({"lora": {"r": 4, "init_lora_weights": "pissa"}, "train": []}, {}, marks=pytest.mark.slow),
        pytest.param({"lora": {"r": 4, "bias": "all"}, "train": []}, {}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_export_was_compared_with_the_trained_model(work, tmp_path, model, trainer):
    run = work.fit(model=model, trainer=trainer)
    probe = TrainedProbe(**work.saved()["tpcompress"]["probe"])
    now = record_trained(run.model.model, probe.inputs, probe.about["precision"])
    if trainer == {}:
        assert torch.equal(now.logits, probe.logits)
    folder = export_run(work.folder / "run", tmp_path / "out")
    reload = json.loads((folder / "manifest.json").read_text())["reload"]
    assert reload["compared"]
    assert reload["logit_gap"] <= reload["limit"]
    assert verify(folder).ok


@pytest.mark.parametrize("what", ["weight", pytest.param("base", marks=pytest.mark.slow)])
def test_a_wrong_reload_is_not_exported(work, tmp_path, what, base_folder):
    """A weight of the checkpoint or of the base that is not the one that trained."""
    work.fit(model=LORA, trainer={"max_steps": 1})
    saved = work.saved()
    if what == "weight":
        name = next(name for name in saved["state_dict"] if "modules_to_save" in name and name.endswith("weight"))
        saved["state_dict"][name] = saved["state_dict"][name] * 1.5
    else:
        other = AutoModelForImageTextToText.from_pretrained(base_folder)
        other.model.language_model.layers[1].mlp.down_proj.weight.data *= 1.5
        other.save_pretrained(tmp_path / "other")
        AutoProcessor.from_pretrained(base_folder).save_pretrained(tmp_path / "other")
        saved["tpcompress"]["settings"]["base"] = str(tmp_path / "other")
    torch.save(saved, work.last())
    with pytest.raises(ValueError, match=r"^The reloaded model is not the one that was trained: [^\n]*$"):
        export_run(work.folder / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_older_checkpoint_is_exported_without_the_comparison(work, tmp_path):
    work.fit(trainer={"max_steps": 1})
    saved = work.saved()
    del saved["tpcompress"]["probe"], saved["tpcompress"]["recipe"]
    torch.save(saved, work.last())
    folder = export_run(work.folder / "run", tmp_path / "out")
    reload = json.loads((folder / "manifest.json").read_text())["reload"]
    assert reload == {"compared": False, "reason": "the checkpoint holds no probe"}


def test_a_large_difference_is_an_error_in_half_precision_too(base_folder):
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    model = load_base(str(base_folder), "bfloat16").eval()
    saved = record_trained(model, inputs, "bf16-true").to_dict()
    assert check_reload(saved, model)["logit_gap"] == 0
    model.lm_head.weight.data *= 1.02  # as rounding
    assert check_reload(saved, model)["logit_gap"] > 0
    model.lm_head.weight.data *= 2
    with pytest.raises(ValueError, match=r"^The reloaded model is not the one that was trained"):
        check_reload(saved, model)


# ------------------------------------------------------------------------------------------------- the dense control


@pytest.mark.parametrize("model", [pytest.param({}, marks=pytest.mark.slow), LORA])
def test_a_dense_run_becomes_a_stock_checkpoint(work, tmp_path, model):
    run = work.fit(model=model | {"plan": None})
    folder = export_run(work.folder / "run", tmp_path / "dense")
    assert {"README.md", "recipe.yaml", "manifest.json", "config.json", "model.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(loaded).__name__ == "LlavaForConditionalGeneration"
    inputs = {"input_ids": torch.arange(5, 12)[None]}
    trained = record_trained(run.model.model, inputs).logits
    torch.testing.assert_close(record_trained(loaded, inputs).logits, trained, rtol=1e-4, atol=1e-4)
    assert AutoProcessor.from_pretrained(folder).image_token == "<image>"
    assert json.loads((folder / "manifest.json").read_text())["reload"]["compared"]
    with pytest.raises(ValueError, match=r"^\S*dense holds a dense model without a plan[^\n]*$"):
        verify(folder)
    export_run(work.folder / "run", folder, overwrite=True)
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_run(work.folder / "run", folder)
    again = work.fit("again", model={"base": str(folder)}, trainer={"max_steps": 1})  # as a base
    assert again.trainer.global_step == 1
    with pytest.raises(ValueError, match=r"^This run has no pruning plan[^\n]*--budgets.$"):
        export_run(work.folder / "run", tmp_path / "none", measure=lambda *_: [])
    assert load_trained(work.folder / "run").trained_with["arm"] == "dense_ft"
