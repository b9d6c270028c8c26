"""HOW the choice reaches the model: `attach` and `detach`, in place, on unmodified transformers classes.

attach(model, "divprune", keep_tokens=64)
model.generate(...)                     # 64 vision tokens per image
with disabled(model): ...               # the base
detach(model)                           # the base, bit for bit
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
from tpcompress.insertion.budget import Budget, read_budgets
from tpcompress.insertion.gates import check_gates
from tpcompress.insertion.hooks import MODES, Controller
from tpcompress.insertion.nested import check_nestable
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.trace import Trace, recording
from tpcompress.insertion.views.available import check_layers, check_moved, check_views
from tpcompress.pruners import Pruner

CONTROLLER = "_tpcompress"
PRUNERS = "token_pruners"


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
        attach(model, "recipes/free/dart.yaml")

    Args:
        model: a transformers vision-language model, or a PEFT model around one.
        plan: any form that `PruningPlan.of` reads: a pruner with a budget, a short form, a mapping, a path, a plan.
        mode: `drop` shortens the sequence, `mask` hides dropped tokens at full length, `off` disables pruning.
        keep_tokens: see `PruningPlan.of`.
        keep_ratio: see `PruningPlan.of`.
        layer: see `PruningPlan.of`.

    Returns:
        The same model.

    Raises:
        TypeError: not a transformers model.
        FileNotFoundError: no such plan file.
        ValueError: not a plan, unknown family, a plan already attached, a layer beyond the model's depth, a pruner
            whose views do not exist at its layer or whose gates cannot act after it, or an unknown mode.
    """
    plan = PruningPlan.of(plan, keep_tokens=keep_tokens, keep_ratio=keep_ratio, layer=layer)
    base = base_of(model)
    if hasattr(base, CONTROLLER):
        raise ValueError("This model already carries a plan; call tpcompress.detach(model) first.")
    parts = resolve(base)
    check_layers(parts, [stage.layer for stage in plan.stages])
    check_views(parts, plan)
    for stage in plan.stages:
        if stage.pruner.gates:
            check_gates(parts, stage.pruner.name, stage.layer)
    pruners = nn.ModuleList(copy.deepcopy(stage.pruner) for stage in plan.stages)
    weight = next(parts.language_model.parameters())
    for stage, pruner in zip(plan.stages, pruners, strict=True):
        assert isinstance(pruner, type(stage.pruner))
        pruner.build(parts.hidden_size)
        pruner.to(weight.device)
    controller = Controller(parts, plan, pruners.train(base.training))
    controller.set_mode(mode)
    base.add_module(PRUNERS, pruners)
    setattr(base, CONTROLLER, controller)
    controller.install()
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take the plan off: the base is back, bit for bit. The pruners and their weights leave the model.

    Raises:
        ValueError: no plan is attached.
    """
    base = base_of(model)
    controller_of(base).uninstall()
    delattr(base, CONTROLLER)
    delattr(base, PRUNERS)
    return model


def controller_of(model: nn.Module) -> Controller:
    """The controller of an attached model.

    Raises:
        ValueError: no plan is attached.
    """
    controller = getattr(base_of(model), CONTROLLER, None)
    if controller is None:
        raise ValueError("No plan is attached to this model; call tpcompress.attach(model, plan) first.")
    return controller


def is_attached(model: nn.Module) -> bool:
    """Whether the model carries a plan."""
    return hasattr(base_of(model), CONTROLLER)


def plan_of(model: nn.Module) -> PruningPlan:
    """The plan of an attached model."""
    return controller_of(model).plan


@contextmanager
def mode(model: nn.Module, name: str) -> Iterator[None]:
    """Run a block in another mode: `drop`, `mask` or `off`.

    Raises:
        ValueError: unknown mode, or no plan attached.
    """
    controller = controller_of(model)
    before = controller.mode
    controller.set_mode(name)
    try:
        yield
    finally:
        controller.set_mode(before)


def disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Run a block without pruning, as the base model: `mode(model, "off")`.

    Raises:
        ValueError: no plan attached.
    """
    return mode(model, "off")


@contextmanager
def budgets(
    model: nn.Module,
    values: Budget | float | Sequence[Budget | float] | None = None,
    *,
    keep_tokens: int | Sequence[int] | None = None,
    keep_ratio: float | Sequence[float] | None = None,
) -> Iterator[None]:
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
    controller = controller_of(model)
    before = controller.budgets
    controller.set_budgets(chosen)
    try:
        yield
    finally:
        controller.set_budgets(before)


@contextmanager
def layers(model: nn.Module, values: Sequence[int]) -> Iterator[None]:
    """Run a block with stages at other layers than the plan's, one per stage: as if a plan of these were attached.

    A cache that was filled in the block is of no use behind it, and the other way round.

    Raises:
        ValueError: layers that do not rise, lie before the plan's own or beyond the model's depth, or at which a pruner
            does not get the views that it needs.
    """
    controller = controller_of(model)
    check_moved(controller.parts, controller.plan, values)
    before = controller.layers
    controller.set_layers(values)
    try:
        yield
    finally:
        controller.set_layers(before)


@contextmanager
def including(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Run a block in which every stage retains what it did in an earlier call, and fills its budget with others.

    Args:
        model: with a plan of exact pruners that only select, in evaluation or without gates.
        trace: what `record` collected in a call of the same batch; its last call counts.

    Raises:
        ValueError: a pruner into whose choice nothing can be put. A call raises it if its batch is another, or if a
            budget is smaller than what is to be included.
    """
    controller = controller_of(model)
    check_nestable(controller.plan)
    before = controller.included
    controller.included = {stage.stage: stage for stage in trace.stages}
    try:
        yield
    finally:
        controller.included = before


def record(model: nn.Module) -> AbstractContextManager[Trace]:
    """Collect what the stages do: `with record(model) as trace: model.generate(...)`; then print(trace)."""
    return recording(controller_of(model))


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model, out of a PEFT wrapper if there is one.

    Raises:
        TypeError: there is none.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base = unwrap() if unwrap is not None else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"Expected a transformers model or a PEFT model around one, got {type(model).__name__}.")
    return base


__all__ = [
    "MODES", "Controller", "attach", "base_of", "budgets", "controller_of", "detach", "disabled", "including", "layers",
    "mode", "plan_of", "record",
]  # fmt: skip
