"""Old names of recipe keys and classes: one line with the new name, or translated where an older run is read."""

import importlib

import pytest
import yaml

from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.losses import Loss
from tpcompress.training.recipe.errors import readable  # noqa: F401  imports every open set
from tpcompress.training.recipe.run import run_recipe
from tpcompress.training.renamed import CLASSES, KEYS, check_names, rename
from tpcompress.training.schedules import Schedule
from tpcompress.training.teachers import Teacher

GATE = {"pruner": {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}, "keep_tokens": 16}


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--model.scorer.steps", "3"], "model.scorer is now model.pruner_phase"),
        (["--model.scorer={steps: 3}"], "model.scorer is now model.pruner_phase"),
        (["--model.teacher", "Milder"], "Milder is now LargerBudget"),
        (["--model.teacher", "{class_path: Copy}"], "Copy is now FrozenCopy"),
        (["--model.schedule.class_path", "Several"], "Several is now Matryoshka"),
        (["--model.pruner_phase.schedule=Several"], "Several is now Matryoshka"),
    ],
)
def test_old_names_on_the_command_line(work, args, line):
    with pytest.raises(ValueError, match=rf"^Renamed: {line}; write the new name on the command line.$"):
        run_recipe(["fit", "--config", str(work.recipe()), *args], progress=False)


def test_old_names_in_a_recipe_are_all_listed(tmp_path):
    old = {
        "model": {
            "scorer": {"schedule": {"class_path": "tpcompress.training.schedules.Several"}},
            "teacher": "Copy",
            "plan": GATE,
        },
        "data": {"class_path": "tpcompress.training.datamodule.ChatData"},
        "trainer": {"strategy": {"class_path": "tpcompress.training.sharding.FSDP2"}},
    }
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(old, sort_keys=False))
    with pytest.raises(ValueError, match=r"^Renamed: [^\n]*$") as error:
        check_names(["fit", "--config", str(path)])
    for name in ("model.scorer is now model.pruner_phase", "Copy is now FrozenCopy", "ChatData is now ChatData"):
        assert name in str(error.value)
    assert str(error.value).endswith(f"write the new name in {path}.")
    assert rename(rename(old)[0])[1] == {}


def test_names_of_others_are_left_alone():
    """A user's own class, the scorer of a pruner, and words that are no class."""
    recipe = {"model": {"plan": GATE, "teacher": "mine.Copy", "base": "Copy"}, "data": {"init_args": {"train": "Copy"}}}
    assert rename(recipe) == (recipe, {})


def test_every_new_name_exists():
    known = {"ChatData", "BenchmarkData"} | {c.__name__ for base in (Loss, Teacher, Schedule) for c in _below(base)}
    for new in CLASSES.values():
        module, _, name = new.rpartition(".")
        assert hasattr(importlib.import_module(module), name) if module else name in known
    assert all(old.count(".") == new.count(".") for old, new in KEYS.items())


def test_a_run_of_an_older_version_is_read(work):
    """Its saved recipe has the old names; what it says of the budgets still reaches the export."""
    model = {"plan": GATE, "train": [], "teacher": "FrozenCopy", "losses": ["Label", "KL"]}
    matryoshka = {"schedule": {"class_path": "Matryoshka", "init_args": {"factors": [1, 3]}}}
    work.fit(model=model | {"pruner_phase": matryoshka}, trainer={"max_steps": 1})
    path = work.folder / "run/recipe.yaml"
    text = path.read_text()
    now = load_trained(work.folder / "run")
    for new, old in (("pruner_phase:", "scorer:"), ("Matryoshka", "Several"), ("frozen_copy.FrozenCopy", "copy.Copy")):
        assert new in text
        text = text.replace(new, old)
    path.write_text(text)
    then = load_trained(work.folder / "run")
    assert then.trained_budgets == now.trained_budgets
    assert [budget.keep_tokens for budget in then.trained_budgets[0]] == [16, 48]
    assert then.trained_with == now.trained_with


def _below(base):
    below = set(base.__subclasses__())
    return below.union(*(_below(cls) for cls in below))
