"""Every preset takes two steps on a small stand-in."""

from pathlib import Path

import pytest
import torch
import yaml
from training.helpers import Watch, Workplace, callback, found
from training.recipe.presets import FILES, PUBLISHED, SWITCHED, switched

from tpcompress.training.optim import group_of
from tpcompress.training.recipe.run import RecipeCLI, run_recipe

# ------------------------------------------------------------------ two steps


QUICK = ("epic_tcd", "learned_two_stage")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in FILES])
def test_two_steps_on_a_tiny_stand_in(name, preset_work, tmp_path):
    run = two_steps(FILES[name], preset_work, tmp_path)
    metrics, watch = run.trainer.callback_metrics, found(run, Watch)
    assert run.trainer.global_step == 2
    assert {key.removeprefix("loss/") for key in metrics if key.startswith("loss/")} - {"total"} == set(
        PUBLISHED[name].losses
    )
    assert torch.isfinite(metrics["loss/total"])
    changed = [{part_of(weight, run.model.parts) for weight in names} for names in watch.changed]
    steps = PUBLISHED[name].trains.split("; then ")
    for step, parts in enumerate(changed):
        words = steps[min(step, len(steps) - 1)].replace("everything", "vision tower, projector, language model")
        assert parts == set(words.split(", ")), step


def part_of(name: str, parts) -> str:
    """The word of the README for what a weight belongs to."""
    return "LoRA" if "lora_" in name else group_of(name, parts).replace("_", " ")


@pytest.mark.slow
@pytest.mark.parametrize("name", SWITCHED)
def test_two_steps_as_published(name, preset_work, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(switched(name)))
    run = two_steps(path, preset_work, tmp_path / "run")
    assert run.trainer.global_step == 2
    assert torch.isfinite(run.trainer.callback_metrics["loss/total"])


def two_steps(path: Path, preset_work: Workplace, folder: Path) -> RecipeCLI:
    """Two steps of a recipe, in single precision; of two phases, one each."""
    args = ["--trainer.max_steps", "2", "--trainer.max_epochs", "-1", "--trainer.limit_train_batches", "1.0"]
    args += ["--trainer.default_root_dir", str(folder), "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    args += ["--trainer.precision", "32-true", "--model.dtype", "float32", "--trainer.accumulate_grad_batches", "1"]
    args += ["--trainer.limit_val_batches", "0"]
    args += ["--model.base", str(preset_work.base), "--model.optimizer.warmup", "1", "--diagnostics.every", "0"]
    args += ["--data.init_args.train", str(preset_work.chat / "chat.json"), "--data.init_args.num_workers", "0"]
    args += ["--data.init_args.image_folder", str(preset_work.chat / "images"), "--data.init_args.batch_size", "2"]
    args += ["--model.pruner_phase.steps", "1"] if "steps: 1000" in path.read_text() else []
    args += ["--trainer.callbacks+", yaml.safe_dump(callback(Watch), default_flow_style=True)]
    return run_recipe(["fit", "--config", str(path), *args], progress=False)
