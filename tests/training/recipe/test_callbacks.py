"""Callbacks, numbers and folders of a recipe: what Lightning documents works here, or is refused with the reason."""

import json
import re
import shlex
from typing import Optional, Union

import jsonargparse
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ProgressBar, RichProgressBar
from training.helpers import Interrupt, callback, make_processor, weights

from tpcompress.export import load, verify
from tpcompress.models import load_base
from tpcompress.training.checkpoints.callback import Checkpoints, StepProgress
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.recipe.export import export_run
from tpcompress.training.recipe.following import following
from tpcompress.training.recipe.numbers import integers_first
from tpcompress.training.recipe.run import RecipeCLI

LIGHTNING = "lightning.pytorch.callbacks"
UNIONS = [Optional[Union[float, int]], Union[float, int, None]]  # noqa: UP007, UP045  cached in this order


def built(work, *args: str, progress: bool = True, **sections) -> RecipeCLI:
    return RecipeCLI(["--config", str(work.recipe(**sections)), *args], progress, run=False)


def of_kind(cli: RecipeCLI, kind: type) -> list:
    return [found for found in cli.trainer.callbacks if isinstance(found, kind)]


# ------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("spelt", UNIONS)
def test_a_whole_number_stays_whole_however_the_union_is_ordered(spelt):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--limit", type=spelt)
    assert isinstance(parser.parse_args(["--limit", "1"]).limit, float)
    integers_first(parser)
    for given, kind in (("1", int), ("1.0", float), ("0.5", float), ("null", type(None))):
        assert type(parser.parse_args(["--limit", given]).limit) is kind


def test_limits_of_the_trainer_are_what_was_written(work):
    limits = {"limit_train_batches": 1, "limit_val_batches": 1, "overfit_batches": 0.5, "val_check_interval": 2}
    flags = [word for name, value in limits.items() for word in (f"--trainer.{name}", str(value))]
    for cli in (built(work, trainer=limits), built(work, *flags)):
        found = {name: cli.config.trainer[name] for name in limits}
        assert found == limits
        assert [type(value) for value in found.values()] == [type(value) for value in limits.values()]
    run = work.fit(trainer={"limit_train_batches": 1, "max_steps": -1, "max_epochs": 1})
    assert run.trainer.global_step == 1


# ------------------------------------------------------------------------------------------------------ callbacks


def test_another_progress_bar_takes_the_place_of_ours(work):
    bar = {"class_path": f"{LIGHTNING}.RichProgressBar"}
    assert [type(found) for found in of_kind(built(work, trainer={"callbacks": [bar]}), ProgressBar)] == [
        RichProgressBar
    ]
    assert [type(found) for found in of_kind(built(work), ProgressBar)] == [StepProgress]
    assert not of_kind(built(work, trainer={"enable_progress_bar": False}), ProgressBar)


def test_weights_that_would_not_be_averaged_are_refused(work):
    averaging = {"class_path": f"{LIGHTNING}.StochasticWeightAveraging", "init_args": {"swa_lrs": 1e-3}}
    with pytest.raises(ValueError, match=r"^StochasticWeightAveraging copies [^\n]*EMAWeightAveraging.$"):
        built(work, trainer={"callbacks": [averaging]})


def test_a_run_without_checkpoints_says_so(work):
    run = work.fit(trainer={"enable_checkpointing": False, "max_steps": 1})
    assert not of_kind(run, Checkpoints)
    assert not work.last().exists()
    assert following(run.trainer, run.model) == (
        "Trained 1 steps; nothing was saved, because trainer.enable_checkpointing is false."
    )


@pytest.mark.slow
def test_averaged_weights_resume_and_are_what_is_exported(work):
    average = {"class_path": f"{LIGHTNING}.EMAWeightAveraging", "init_args": {"decay": 0.5}}
    whole = work.fit("whole", trainer={"callbacks": [average], "max_steps": 4})
    broken = {"callbacks": [average, callback(Interrupt, batch=1)], "max_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        work.fit(trainer=broken)
    size = {name: len(work.saved()[name]) for name in ("state_dict", "current_model_state")}
    assert size["state_dict"] == size["current_model_state"] == len(whole.model.trainable)
    resumed = work.fit("run", "--ckpt_path", "last", trainer={"callbacks": [average], "max_steps": 4})
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    trained = load_trained(work.folder / "run")  # compared with the probe of the averaged weights
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in trained.model.named_parameters())


# ------------------------------------------------------------------------------------------------- where it leads


def test_a_best_checkpoint_keeps_recipe_and_budgets_wherever_it_lies(work, tmp_path):
    best = {"class_path": f"{LIGHTNING}.ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "best"),
            "monitor": "val/loss", "every_n_train_steps": None, "save_on_train_epoch_end": False}}  # fmt: skip
    schedule = {"class_path": "RandomBudget", "init_args": {"low": 0.5, "high": 2.0}}
    trainer = {"callbacks": [best], "max_steps": 3, "val_check_interval": 3}
    work.fit(model={"schedule": schedule}, data={"val_fraction": 0.2}, trainer=trainer)
    (path,) = (tmp_path / "best").iterdir()
    folder = export_run(path, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["trained_budgets"] is not None
    assert manifest["trained_with"]["schedule"]["class"] == "RandomBudget"
    assert "RandomBudget" in (folder / "recipe.yaml").read_text()
    assert manifest["reload"]["compared"]
    assert verify(folder).ok


def test_an_early_stopped_run_says_how_it_is_exported(work):
    how = {"monitor": "loss/total", "stopping_threshold": 1e9, "check_on_train_epoch_end": True}
    stopping = {"class_path": f"{LIGHTNING}.EarlyStopping", "init_args": how}
    run = work.fit("a run", trainer={"callbacks": [stopping], "max_steps": 9})
    assert of_kind(run, EarlyStopping)
    said = following(run.trainer, run.model)
    assert said.startswith(f"Trained up to step 5 of 9: {work.folder / 'a run'}. Next: tpcompress export ")
    command = shlex.split(said.partition("Next: ")[2])
    assert command[-1] == "--allow-unfinished"
    ckpt, out = command[command.index("--ckpt") + 1], command[command.index("--out") + 1]
    assert load(export_run(ckpt, out, allow_unfinished=True)) is not None


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        pytest.param({"fast_dev_run": True}, "^Ran without an error; fast_dev_run", marks=pytest.mark.slow),
        ({"max_steps": 0}, "^No step was taken"),
    ],
)
def test_nothing_is_advised_where_nothing_was_saved(work, trainer, said):
    run = work.fit(trainer=trainer)
    assert re.match(said, following(run.trainer, run.model))


@pytest.mark.slow
def test_home_is_expanded(work, monkeypatch):
    monkeypatch.setenv("HOME", str(work.folder))
    work.fit(trainer={"default_root_dir": "~/at home", "max_steps": 1})
    longer = {"default_root_dir": "~/at home", "max_steps": 2}
    assert work.fit("run", "--ckpt_path", "last", trainer=longer).trainer.global_step == 2
    again = work.fit("run", "--ckpt_path", "~/at home", trainer=longer | {"max_steps": 3})
    assert again.trainer.global_step == 3
    folder = export_run("~/at home", "~/out")
    assert folder == work.folder / "out"
    assert load("~/out") is not None
    assert verify("~/out").ok


@pytest.mark.parametrize("plan", [None, {"pruner": "pool", "keep_tokens": 16}])
def test_an_export_is_no_base(work, tmp_path, plan):
    folder = tmp_path / "out"
    folder.mkdir()
    make_processor().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "tpcompress_llava"}))
    with pytest.raises(ValueError, match=r"^'\S*out' is an export of tpcompress, which always prunes[^\n]*$"):
        work.fit(model={"base": str(folder), "plan": plan})
    with pytest.raises(ValueError, match=r"^'\S*out' is an export of tpcompress"):
        load_base(str(folder))
