"""Attaches a plan to an unmodified transformers model in place, detaches it, and changes its settings for a block.

attach(model, "divprune", keep_tokens=64)
model.generate(...)                     # 64 vision tokens per image
with disabled(model): ...               # the base
detach(model)                           # the base, bit for bit

Settings hold in the thread or asyncio task that sets them: other threads run under the settings of `attach`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tpcompress.families import resolve
from tpcompress.insertion.attachment import Attachment
from tpcompress.insertion.budget import Budget, read_budgets
from tpcompress.insertion.gates import check_gates
from tpcompress.insertion.hooks import Hooks
from tpcompress.insertion.nested import check_nestable
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.settings import MODES, Placement
from tpcompress.insertion.trace import Trace
from tpcompress.insertion.unpruned import check_fixed_count
from tpcompress.insertion.views.available import check_layers, check_moved, check_views
from tpcompress.pruners import Pruner

ATTACHED = "_tpcompress"
"""Attribute of an attached model that holds its `Hooks`."""
PRUNERS = "token_pruners"
"""Submodule of an attached model that holds its pruners."""


def attach(
    model: nn.Module,
    plan: PruningPlan | Stage | Pruner | str | Path | Mapping[str, Any] | Sequence[Any],
    mode: str = "drop",
    *,
    keep_tokens: int | Sequence[int] | None = None,
    keep_ratio: float | Sequence[float] | None = None,
    layer: int | None = None,
) -> nn.Module:
    """Attach a pruning plan to a model in place; only hooks are added, its class and parameter names stay.

    Copies of the plan's pruners become the submodule `token_pruners` of the model.

        attach(model, "divprune", keep_tokens=64)
        attach(model, "divprune:64@0,dart:0.25@8")
        attach(model, "dart:paper")

    Args:
        model: a transformers vision-language model, or a PEFT model around one.
        plan: any form that `PruningPlan.of` reads: a pruner with a budget, a short form, a mapping, a path, a plan.
        mode: `drop` shortens the sequence, `mask` hides dropped tokens at full length, `off` disables pruning, `learn`
            is `mask` in training and `drop` in evaluation (see `tpcompress.trainable`).
        keep_tokens: see `PruningPlan.of`.
        keep_ratio: see `PruningPlan.of`.
        layer: see `PruningPlan.of`.

    Returns:
        The same model.

    Raises:
        TypeError: not a transformers model.
        FileNotFoundError: no such plan file.
        ValueError: not a plan, unknown family, a plan already attached, a layer beyond the model's depth, a pruner
            whose views do not exist at its layer or whose gates cannot act after it, counts that no image of the model
            exceeds, or an unknown mode.
    """
    return attach_plan(model, PruningPlan.of(plan, keep_tokens=keep_tokens, keep_ratio=keep_ratio, layer=layer), mode)


def attach_plan(model: nn.Module, plan: PruningPlan, mode: str = "drop") -> nn.Module:
    """Attach a plan that has been read already; see `attach`."""
    base = base_of(model)
    if is_attached(base):
        raise ValueError(_carries(base))
    parts = resolve(base)
    check_layers(parts, [stage.layer for stage in plan.stages])
    check_views(parts, plan)
    check_fixed_count(parts, plan)
    for stage in plan.stages:
        if stage.pruner.gates:
            check_gates(parts, stage.pruner.name, stage.layer)
    pruners = nn.ModuleList(copy.deepcopy(stage.pruner) for stage in plan.stages)
    # Weights that accelerate offloads are on the meta device between calls.
    devices = (weight.device for weight in parts.language_model.parameters() if not weight.is_meta)
    device = next(devices, None)
    for stage, pruner in zip(plan.stages, pruners, strict=True):
        assert isinstance(pruner, type(stage.pruner))
        pruner.build(parts.hidden_size)
        pruner.to(device)
    hooks = Hooks(Attachment.of(parts, plan, pruners.train(base.training), mode))
    base.add_module(PRUNERS, pruners)
    setattr(base, ATTACHED, hooks)
    hooks.install()
    return model


def detach(model: nn.Module) -> nn.Module:
    """Detach the plan: the model is the base again, bit for bit, without the pruners and their weights.

    Raises:
        ValueError: no plan is attached.
    """
    base = base_of(model)
    _hooks_of(base).uninstall()
    delattr(base, ATTACHED)
    delattr(base, PRUNERS)
    return model


def attachment_of(model: nn.Module) -> Attachment:
    """The attachment of a model: plan, pruners, parts, and the settings of this context.

    Raises:
        ValueError: no plan is attached.
    """
    return _hooks_of(model).attachment


def is_attached(model: nn.Module) -> bool:
    """Whether a plan is attached to the model."""
    return hasattr(base_of(model), ATTACHED)


def plan_of(model: nn.Module) -> PruningPlan:
    """The plan of an attached model.

    Raises:
        ValueError: no plan is attached.
    """
    return attachment_of(model).plan


def mode(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """Run a block in another mode: `drop`, `mask`, `off` or `learn`.

    Raises:
        ValueError: unknown mode, or no plan attached.
    """
    return attachment_of(model).using(mode=name, mode_chosen=True)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Run a block without pruning, as the base model: `mode(model, "off")`.

    Raises:
        ValueError: no plan attached.
    """
    return mode(model, "off")


def budgets(
    model: nn.Module,
    values: Budget | float | Sequence[Budget | float] | None = None,
    *,
    keep_tokens: int | Sequence[int] | None = None,
    keep_ratio: float | Sequence[float] | None = None,
) -> AbstractContextManager[None]:
    """Run a block with budgets other than the plan's: `with budgets(model, keep_tokens=32): ...`.

    Args:
        model: with a plan attached.
        values: one `Budget`, count (int) or ratio (float) per stage.
        keep_tokens: count of the plan's only stage, or one per stage.
        keep_ratio: the same as ratios.

    Raises:
        ValueError: none or several of the three, not one value per stage, or no plan attached.
    """
    chosen = read_budgets(values, keep_tokens, keep_ratio)
    if chosen is None:
        raise ValueError("No budget is given; give keep_tokens, keep_ratio, or one Budget per stage.")
    return attachment_of(model).using(budgets=tuple(chosen))


@contextmanager
def layers(model: nn.Module, values: Sequence[int]) -> Iterator[None]:
    """Run a block with stages at other layers than the plan's, one per stage, as if a plan of these were attached.

    A cache that was filled in the block cannot be continued after it, and the other way round.

    Raises:
        ValueError: layers that do not rise, lie before the plan's own or beyond the model's depth, or at which a view
            that a pruner needs does not exist.
    """
    hooks = _hooks_of(model)
    attachment = hooks.attachment
    check_moved(attachment.parts, attachment.plan, values)
    with hooks.placed(Placement.of(attachment.plan, values, len(attachment.parts.layers))):
        yield


@contextmanager
def force_retain(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Run a block in which every stage retains what it did in an earlier call, and fills its budget with other tokens.

    Args:
        model: with a plan of pruners with exact counts that only select; in evaluation, or without gates.
        trace: record of a call of the same batch, of which the last prefill counts.

    Raises:
        ValueError: a pruner to whose choice nothing can be added. A call raises it for another batch, and for a budget
            smaller than the number of tokens to retain.
    """
    attachment = attachment_of(model)
    check_nestable(attachment.plan)
    with attachment.using(retained={stage.stage: stage for stage in trace.stages}):
        yield


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Record the stages of a block: `with record(model) as trace: model.generate(...)`; then `print(trace)`.

    Raises:
        ValueError: no plan is attached.
    """
    attachment, trace = attachment_of(model), Trace()
    with attachment.using(traces=(*attachment.settings.traces, trace)):
        yield trace


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model, unwrapped from a PEFT model.

    Raises:
        TypeError: there is none.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base = unwrap() if unwrap is not None else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"Expected a transformers model or a PEFT model around one, got {type(model).__name__}.")
    return base


def _carries(base: PreTrainedModel) -> str:
    """Why no plan can be attached to a model that carries one."""
    own = ", ".join(f"{stage.pruner.name} with {stage.budget} at layer {stage.layer}" for stage in plan_of(base).stages)
    if not hasattr(base.config, "token_pruning"):
        return f"This model already carries a plan ({own}); call tpcompress.detach(model) first."
    return (
        f"This model is an export, which carries its plan ({own}). For other budgets use tpcompress.budgets, or load "
        f"it with keep_tokens=...; for another plan call tpcompress.detach(model) first."
    )


def _hooks_of(model: nn.Module) -> Hooks:
    hooks: Hooks | None = getattr(base_of(model), ATTACHED, None)
    if hooks is None:
        raise ValueError("No plan is attached to this model; call tpcompress.attach(model, plan) first.")
    return hooks


__all__ = [
    "ATTACHED", "MODES", "PRUNERS", "Attachment", "attach", "base_of", "budgets", "attachment_of", "detach",
    "force_retain", "is_attached", "layers", "mode", "plan_of", "record",
]  # fmt: skip
