"""What a run's folder says of its training reaches the export."""

import json

import pytest
import torch
from transformers.utils import is_bitsandbytes_available

from tpcompress.export import verify
from tpcompress.insertion.plan import Budget
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.checkpoints.run_folder import _range
from tpcompress.training.recipe.export import export_run
from tpcompress.training.schedules import list_schedules

GATE = {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}
DRAWN = {
    "RandomBudget": {"low": 0.5, "high": 2.0},
    "Sandwich": {"low": 0.5, "high": 2.0},
    "Matryoshka": {"factors": [2, 0.5, 1]},
}
RAMPS = {"Constant": {}, "Linear": {}, "Cosine": {}, "Steps": {"factors": [4, 2]}, "LayerRamp": {}}


@pytest.mark.parametrize("name", list_schedules())
def test_the_range_at_the_end_of_every_schedule(name):
    cls = list_schedules()[name]
    made = cls(**(DRAWN | RAMPS).get(name, cls.test_arguments[0]))
    low, high = _range(made, Budget(keep_tokens=16))
    if name in DRAWN:
        assert (low.keep_tokens, high.keep_tokens) == (8, 32)
    elif name in RAMPS:
        assert low == high == Budget(keep_tokens=16)
    elif name == "EpicWindow":  # ends at shares of its own
        assert (round(low.keep_ratio, 2), round(high.keep_ratio, 2)) == (0.26, 0.74)
    else:
        assert low.count(144) <= high.count(144)


def schedule(name, **arguments):
    return {"class_path": name, "init_args": arguments}


@pytest.mark.parametrize(
    ("model", "span"),
    [
        ({}, (16, 16)),
        ({"schedule": schedule("Sandwich", low=0.5, high=2.0)}, (8, 32)),
        # Only the scorer trains, so its phase is the last one; then the language model's is.
        (
            {
                "plan": {"pruner": GATE, "keep_tokens": 16},
                "train": [],
                "pruner_phase": {"schedule": schedule("Matryoshka", factors=[1, 3])},
            },
            (16, 48),
        ),
        (
            {
                "plan": {"pruner": GATE, "keep_tokens": 16},
                "pruner_phase": {"schedule": schedule("Matryoshka", factors=[1, 3])},
            },
            (16, 16),
        ),
    ],
    ids=["constant", "sandwich", "scorer", "both"],
)
def test_a_run_knows_the_budgets_that_it_ended_with(work, model, span):
    work.fit(model=model, trainer={"max_steps": 2})
    ((low, high),) = load_trained(work.folder / "run").trained_budgets
    assert (low.keep_tokens, high.keep_tokens) == span


def test_the_export_says_how_it_was_trained(work, tmp_path):
    model = {"schedule": schedule("RandomBudget", low=0.5, high=2.0), "lora": {"r": 4}, "teacher": "AdapterOff"}
    work.fit(model=model | {"train": [], "losses": ["Label", "KL"]}, diagnostics={"every": 1}, trainer={"max_steps": 2})
    folder = export_run(work.folder / "run", tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["trained_with"]
    assert facts["schedule"] == {"class": "RandomBudget", "low": 0.5, "high": 2.0, "log": True}
    assert [loss["class"] for loss in facts["losses"]] == ["Label", "KL"]
    assert facts["teacher"]["class"] == "AdapterOff"
    assert facts["diagnostics"]["last"]["step"] == 2
    assert manifest["trained_budgets"][0]["retained"] == [8, 32]
    assert sorted(verify(folder).others) == ["32 tokens", "8 tokens"]
    assert "## Does the pruner beat random?" in (folder / "README.md").read_text()
    (work.folder / "run/diagnostics.json").unlink()
    assert "diagnostics" not in load_trained(work.folder / "run").trained_with
    (work.folder / "run/diagnostics.json").write_text("{")
    with pytest.raises(ValueError, match=r"diagnostics.json is damaged \(JSONDecodeError\); remove it"):
        load_trained(work.folder / "run")


def test_adapters_of_a_quantised_base_are_merged_into_its_own_weights(work, tmp_path):
    work.fit(model={"lora": {"r": 4}, "train": []}, trainer={"max_steps": 1})
    saved = work.saved()
    saved["tpcompress"]["settings"]["quantize"] = {"load_in_4bit": True}
    torch.save(saved, work.last())
    if not is_bitsandbytes_available():
        with pytest.raises(ValueError, match="quantize requires bitsandbytes"):
            load_trained(work.folder / "run")
    folder = export_run(work.folder / "run", tmp_path / "out")
    assert verify(folder).ok
    facts = json.loads((folder / "manifest.json").read_text())["trained_with"]
    assert facts["quantize"] == {"load_in_4bit": True}
    assert "merged into the unquantised weights" in (folder / "README.md").read_text()


def test_a_checkpoint_contains_its_recipe_and_an_older_one_says_less(work, tmp_path):
    work.fit(trainer={"max_steps": 1})
    (work.folder / "run/recipe.yaml").unlink()
    trained = load_trained(work.folder / "run")
    assert trained.recipe["model"]["base"] == str(work.base)
    assert trained.trained_budgets is not None
    saved = work.saved()
    del saved["tpcompress"]["recipe"]
    torch.save(saved, work.last())
    trained = load_trained(work.folder / "run")
    assert trained.recipe is None
    assert trained.trained_budgets is None
    assert "schedule" not in trained.trained_with
