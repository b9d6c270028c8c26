"""Loads a trained model from the checkpoint of a run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpcompress.export.budgets import Range
from tpcompress.export.trained_probe import check_reload
from tpcompress.insertion.attach import base_of
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
        recipe: recipe of the run, of which the checkpoint has a copy; None for older ones without a file beside them.
        trained_with: settings and results of the training, for the manifest of an export.
        trained_budgets: lowest and highest budget of each stage at the end of the run; None without a recipe or plan.
        probe: answer of the model in the training process, as `tpcompress.export.trained_probe` records it.
    """

    model: nn.Module
    processor: Any
    recipe: dict[str, Any] | None
    trained_with: dict[str, Any]
    trained_budgets: list[Range] | None
    probe: dict[str, Any]


def load_trained(checkpoint: str | Path, allow_unfinished: bool = False, unquantised: bool = False) -> TrainedModel:
    """Rebuild the model of a run from its checkpoint.

    Args:
        checkpoint: a .ckpt file, or the run's folder (its last checkpoint).
        allow_unfinished: accept a run that was stopped before its last step.
        unquantised: load the full-precision weights of a base that was quantised in training, so that adapters can be
            merged into them.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a checkpoint that is damaged, of an unfinished run, or not of tpcompress; or a model that behaves
            otherwise than in the training process.
    """
    path, saved = checkpoint_file(checkpoint), read_checkpoint(checkpoint, mapped=True)
    done, steps, settings = saved[KEY]["step"], saved[KEY]["steps"], saved[KEY]["settings"]
    if done < steps and not allow_unfinished:
        resume = f"tpcompress fit ... --ckpt_path {shlex.quote(str(path))}"
        raise ValueError(
            f"This run stopped at step {done} of {steps}; finish it with `{resume}`, "
            f"or export it as it is with --allow-unfinished."
        )
    quantised = settings.get("quantize")
    module = PruningModule(**settings | ({"quantize": None} if unquantised else {}))
    module.configure_model()
    check_weights(module, module.trainable, saved["state_dict"])
    assert module.model is not None
    _put_weights(module, saved["state_dict"])
    recipe = saved[KEY].get("recipe") or read_recipe(path.parent.parent / "recipe.yaml")
    probe = saved[KEY].get("probe", {"reason": "the checkpoint holds no probe"})
    if quantised is not None:
        probe = {"reason": "the base was quantised in training"}
    check_reload(probe, module.model)
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
    return TrainedModel(module.model.eval(), module.processor, recipe, trained_with, ranges, probe)


def _put_weights(module: PruningModule, state: dict[str, Tensor]) -> None:
    """Give a module the trained weights in place of the base's, which are freed one by one: never both as a whole."""
    own = module.state_dict()
    same = all(own[name].dtype == value.dtype for name, value in state.items() if name in own)
    del own
    module.load_state_dict(state, strict=False, assign=same)
    assert module.model is not None
    base: Any = base_of(module.model)
    if same:
        base.tie_weights()  # a weight that was replaced is another tensor than its twin's
