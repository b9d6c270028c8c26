"""Content of a checkpoint: the trained weights, and the settings from which their model is rebuilt."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import Tensor, nn

from tpcompress.training.phases import steps_alone

KEY = "tpcompress"
"""Entry of a checkpoint with `step` done, `steps` of the run, `settings` of the model, recipe and probe."""
AVERAGED = "current_model_state"
"""Entry that Lightning's WeightAveraging adds: the weights that train, beside their average in `state_dict`."""


def complete(checkpoint: dict[str, Any], module: Any, probe: Any) -> None:
    """Reduce a checkpoint of Lightning to the trained weights, and add what rebuilds and checks their model.

    Args:
        checkpoint: changed in place.
        module: the PruningModule of the run.
        probe: its ProbeOfRun.
    """
    for part in {"state_dict", AVERAGED} & checkpoint.keys():
        checkpoint[part] = trained_state(module, module.trainable, checkpoint[part], module.added)
    checkpoint[KEY] = {
        "step": module.global_step,
        "steps": module.total_steps,
        "settings": module.settings,
        "alone": steps_alone(module.phases),
        "recipe": module.recipe,
        "probe": probe.record(module, checkpoint["state_dict"]),
    }


def trained_state(
    module: nn.Module, trained: list[nn.Parameter], state: dict[str, Tensor], added: Set[str] = frozenset()
) -> dict[str, Tensor]:
    """The trained weights of a state dict, adapters and buffers of the pruners; everything else comes from the base.

    Args:
        module: the module of the run.
        trained: parameters that train in some phase.
        state: its state dict.
        added: names, within the model, of the tensors that adapters added. Some tuners freeze a part of them, which
            was drawn or computed at the start.
    """
    ours = {id(parameter) for parameter in trained}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in ours}
    names |= {name for name, _ in module.named_buffers() if "token_pruners." in name}
    names |= {f"model.{name}" for name in added}
    return {name: value for name, value in state.items() if name in names}


def with_base_weights(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Complete the weights of a checkpoint whose callback averages them, which reads whole state dicts.

    Args:
        module: module of the run, with the base loaded.
        checkpoint: changed in place, if it holds averaged weights.
    """
    if AVERAGED in checkpoint:
        own = module.state_dict()
        for name in ("state_dict", AVERAGED):
            checkpoint[name] = own | checkpoint[name]


def check_weights(module: nn.Module, trained: list[nn.Parameter], state: dict[str, Tensor]) -> None:
    """Refuse a checkpoint that lacks weights which train in this run.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    ours = {id(parameter) for parameter in trained}
    wanted = {name: p.shape for name, p in module.named_parameters() if id(p) in ours}
    missing = [name for name in wanted if name not in state or state[name].shape != wanted[name]]
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} of the {len(wanted)} weights that train here, {missing[0]} first; "
            f"it is of another recipe."
        )


def check_settings(now: dict[str, Any], then: dict[str, Any]) -> None:
    """Refuse to resume a run under other settings.

    Raises:
        ValueError: base, plan, trained parts or LoRA have changed.
    """
    changed = [name for name in ("base", "plan", "train", "lora") if _said(now[name]) != _said(then.get(name))]
    if changed:
        name = changed[0]
        raise ValueError(
            f"The checkpoint was trained with {name} {then.get(name)}, the recipe has {now[name]}; resume with the "
            f"recipe.yaml beside it, or start again without --ckpt_path."
        )


def _said(value: Any) -> Any:
    """A setting without the version of its form: a plan of an earlier version is the same plan."""
    return {k: v for k, v in value.items() if k != "version"} if isinstance(value, dict) else value
