"""Loads a trained model from the checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tpcompress.export.budgets import Range
from tpcompress.training.checkpoint_content import KEY, check_weights
from tpcompress.training.checkpoints.read import checkpoint_file, read_checkpoint
from tpcompress.training.checkpoints.run_folder import final_ranges, manifest_entry, read_recipe
from tpcompress.training.module import PruningModule


@dataclass(frozen=True)
class TrainedModel:
    """A model and the settings of its run.

    Attributes:
        model: model in eval mode, with the plan attached at its own budgets and LoRA not yet merged.
        processor: processor of the base.
        recipe: path of the recipe beside the checkpoint; None if there is none.
        trained_with: settings and results of the training, for the manifest of an export.
        trained_budgets: lowest and highest budget of each stage at the end of the run; None without a recipe or plan.
    """

    model: nn.Module
    processor: Any
    recipe: Path | None
    trained_with: dict[str, Any]
    trained_budgets: list[Range] | None = None


def load_trained(checkpoint: str | Path, allow_unfinished: bool = False, unquantised: bool = False) -> TrainedModel:
    """Rebuild the model of a run from its checkpoint.

    Args:
        checkpoint: a .ckpt file, or the run's folder (its last checkpoint).
        allow_unfinished: accept a run that was stopped before its last step.
        unquantised: load the full-precision weights of a base that was quantised in training, so that adapters can be
            merged into them.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a checkpoint that is damaged, of an unfinished run, or not of tpcompress.
    """
    path, saved = checkpoint_file(checkpoint), read_checkpoint(checkpoint)
    done, steps, settings = saved[KEY]["step"], saved[KEY]["steps"], saved[KEY]["settings"]
    if done < steps and not allow_unfinished:
        raise ValueError(
            f"This run stopped at step {done} of {steps}; finish it with `tpcompress fit ... --ckpt_path {path}`, "
            f"or export it as it is with --allow-unfinished."
        )
    quantised = settings.get("quantize")
    module = PruningModule(**settings | ({"quantize": None} if unquantised else {}))
    module.configure_model()
    check_weights(module, module.trainable, saved["state_dict"])
    module.load_state_dict(saved["state_dict"], strict=False)
    assert module.model is not None
    path_of_recipe = path.parent.parent / "recipe.yaml"
    recipe = read_recipe(path_of_recipe)
    trained_with = {
        "arm": "training_aware" if module.plan is not None else "dense_ft",
        "steps": done,
        "train": settings["train"],
        "lora": settings["lora"],
        "base": module.base,
    }
    if quantised is not None:
        trained_with["quantize"] = quantised
    ranges = final_ranges(module, recipe, steps) if recipe is not None else None
    trained_with |= manifest_entry(path.parent.parent, recipe)
    return TrainedModel(
        module.model.eval(), module.processor, None if recipe is None else path_of_recipe, trained_with, ranges
    )
