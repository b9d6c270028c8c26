"""A finished run's checkpoint, made a model again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpcompress.training.module import PruningModule


@dataclass(frozen=True)
class TrainedModel:
    """What a checkpoint holds.

    Attributes:
        model: in eval mode, plan attached with its own budgets, LoRA not yet merged.
        processor: of its base.
        recipe: path of the recipe beside the checkpoint, if it is there.
        trained_with: what the manifest of an export says of the training.
    """

    model: nn.Module
    processor: Any
    recipe: Path | None
    trained_with: dict[str, Any]


def load_trained(checkpoint: str | Path, allow_unfinished: bool = False) -> TrainedModel:
    """Rebuild the model of a run from its checkpoint.

    Args:
        checkpoint: a .ckpt file, or the run's folder (its last checkpoint).
        allow_unfinished: accept a run that was stopped before its last step.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: not a tpcompress checkpoint, damaged, or of an unfinished run.
    """
    path = Path(checkpoint)
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at {path}; give a .ckpt file or the folder of a run.")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); take an earlier checkpoint.") from error
    if not isinstance(saved, dict) or "tpcompress" not in saved:
        raise ValueError(f"{path} is not a tpcompress checkpoint; it must come from `tpcompress fit`.")
    done, steps = saved["tpcompress"]["step"], saved["tpcompress"]["steps"]
    if done < steps and not allow_unfinished:
        raise ValueError(
            f"This run stopped at step {done} of {steps}; finish it with `tpcompress fit ... --ckpt_path {path.name}`, "
            f"or export it as it is with --allow_unfinished true."
        )
    settings = {k: v for k, v in saved["hyper_parameters"].items() if not k.startswith("_")}
    module = PruningModule(**settings)
    module.configure_model()
    wanted = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    missing = sorted(wanted - set(saved["state_dict"]))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} trained weights, {missing[0]} first; it is not of this recipe.")
    module.load_state_dict(saved["state_dict"], strict=False)
    assert module.model is not None
    recipe = path.parent.parent / "recipe.yaml"
    arm = "training_aware" if module.plan is not None else "dense_ft"
    trained_with = {
        "arm": arm,
        "steps": done,
        "train": settings["train"],
        "lora": settings["lora"],
        "base": module.base,
    }
    return TrainedModel(module.model.eval(), module.processor, recipe if recipe.is_file() else None, trained_with)
