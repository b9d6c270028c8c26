"""Content of a checkpoint: the trained weights, and the settings from which their model is rebuilt."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

KEY = "tpcompress"
"""Entry of a checkpoint with `step` done, `steps` of the run, and `settings` of the model."""


def trained_state(module: nn.Module, trained: list[nn.Parameter], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights of a state dict, and the buffers of the pruners; everything else comes from the base."""
    ours = {id(parameter) for parameter in trained}
    names = {name for name, parameter in module.named_parameters() if id(parameter) in ours}
    names |= {name for name, _ in module.named_buffers() if "token_pruners." in name}
    return {name: value for name, value in state.items() if name in names}


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
