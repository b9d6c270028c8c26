"""A finished run's checkpoint, made a model again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tpcompress.export.budgets import Range
from tpcompress.training.checkpoints.run_folder import facts_of, final_ranges, read_recipe
from tpcompress.training.checkpoints.state import KEY, check_weights, checkpoint_file, read_checkpoint
from tpcompress.training.module import PruningModule


@dataclass(frozen=True)
class TrainedModel:
    """What a checkpoint holds.

    Attributes:
        model: in eval mode, plan attached with its own budgets, LoRA not yet merged.
        processor: of its base.
        recipe: path of the recipe beside the checkpoint, if it is there.
        trained_with: what the manifest of an export says of the training.
        trained_budgets: lowest and highest budget of each stage that the run ended with; None without a recipe or plan.
    """

    model: nn.Module
    processor: Any
    recipe: Path | None
    trained_with: dict[str, Any]
    trained_budgets: list[Range] | None = None


def load_trained(checkpoint: str | Path, allow_unfinished: bool = False, whole: bool = False) -> TrainedModel:
    """Rebuild the model of a run from its checkpoint.

    Args:
        checkpoint: a .ckpt file, or the run's folder (its last checkpoint).
        allow_unfinished: accept a run that was stopped before its last step.
        whole: load a base that was quantised in training in its own weights, into which adapters can be merged.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: not a tpcompress checkpoint, damaged, or of an unfinished run.
    """
    path, saved = checkpoint_file(checkpoint), read_checkpoint(checkpoint)
    done, steps, settings = saved[KEY]["step"], saved[KEY]["steps"], saved[KEY]["settings"]
    if done < steps and not allow_unfinished:
        raise ValueError(
            f"This run stopped at step {done} of {steps}; finish it with `tpcompress fit ... --ckpt_path {path}`, "
            f"or export it as it is with --allow_unfinished true."
        )
    quantised = settings.get("quantize")
    module = PruningModule(**settings | ({"quantize": None} if whole else {}))
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
    trained_with |= facts_of(path.parent.parent, recipe)
    return TrainedModel(
        module.model.eval(), module.processor, None if recipe is None else path_of_recipe, trained_with, ranges
    )
