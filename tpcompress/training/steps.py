"""One training step: the mode, budgets and layers it runs with, its forward calls, and the losses of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tpcompress.insertion.attach import controller_of, is_attached, layers, mode
from tpcompress.insertion.plan import Budget
from tpcompress.training.losses import needs_of, weighed
from tpcompress.training.losses.base import at
from tpcompress.training.passes import Pass, run_pass
from tpcompress.training.phases import NO_GRADIENT_REACHES_PRUNER, Phase

if TYPE_CHECKING:
    from tpcompress.training.module import PruningModule


def student_passes(
    module: PruningModule, phase: Phase, batch: Mapping[str, Any], draw: float, blind: bool = False
) -> list[tuple[Pass, dict[str, Tensor]]]:
    """The forward calls of a step, one for each budget of its schedule, each with its weighted losses.

    Args:
        module: the LightningModule, its model standing.
        phase: of the step.
        batch: what the collator made.
        draw: random number of the step, the same on all ranks.
        blind: the batch's only picture is a dummy, whose choice is nobody's business.
    """
    assert module.model is not None
    progress = phase.progress(module.global_step)
    needs, done = needs_of(phase.losses, progress), []
    for values in step_budgets(module, phase, progress, draw):
        with pruning(module, phase, progress):
            here = run_pass(module.model, batch, values, own="own" in needs)
        if blind:
            here = replace(here, trace=None)
        taught = None
        if "teacher" in needs and module.teacher is not None:
            taught = module.teacher(module, batch, here, progress)
        done.append((here, weighed(phase.losses, here, taught, progress)))
    return done


def check_reached(module: PruningModule, phase: Phase, passes: list[tuple[Pass, dict[str, Tensor]]]) -> None:
    """See that a loss without a gradient is not that of a learned pruner which chose, and trains alone.

    Raises:
        ValueError: it is: nothing would ever be learnt.
    """
    waits = phase.full_every > 1 or not all(
        at(loss.weight, phase.progress(module.global_step)) for loss in phase.losses
    )
    if not phase.pruner or phase.rest or waits or not any(losses for _, losses in passes):
        return
    assert module.model is not None
    pruners = controller_of(module.model).pruners
    stages = [stage for here, _ in passes if here.trace is not None for stage in here.trace.stages]
    if any(stage.selection is not None and any(stage.vision_in) and pruners[stage.stage].learned for stage in stages):
        raise ValueError(NO_GRADIENT_REACHES_PRUNER)


def step_budgets(module: PruningModule, phase: Phase, progress: float, draw: float) -> list[list[Budget] | None]:
    """Budgets of the stages in each forward call of a step; None without a plan."""
    if module.plan is None:
        return [None]
    each = [phase.schedule.budgets(stage.budget, progress, draw) for stage in module.plan.stages]
    return [list(values) for values in zip(*each, strict=True)]


def step_layers(module: PruningModule, phase: Phase, progress: float) -> list[int]:
    """Layers of the stages at a step: rising, and within the model."""
    assert module.plan is not None and module.parts is not None
    depth = len(module.parts.layers)
    found = [phase.schedule.layer(stage.layer, depth, progress) for stage in module.plan.stages]
    for number in range(len(found) - 2, -1, -1):
        found[number] = min(found[number], found[number + 1] - 1)
    return found


def finish(model: nn.Module) -> None:
    """Tell the pruners that training is over, as it is in an export: one that follows a schedule is at its end.

    The next step tells them again how far they are.
    """
    for pruner in controller_of(model).pruners if is_attached(model) else []:
        pruner.set_progress(1.0)  # type: ignore[operator]


@contextmanager
def pruning(module: PruningModule, phase: Phase, progress: float, full: bool | None = None) -> Iterator[None]:
    """Run a block as the step is run: pruners told how far they are, mode and layers set.

    Args:
        module: the LightningModule, its model standing.
        phase: of the step.
        progress: share of the phase that is done.
        full: whether it sees the full length; None goes by the number of the step.
    """
    if module.plan is None:
        yield
        return
    assert module.model is not None
    for pruner in controller_of(module.model).pruners:
        # One that has learnt chooses as in the export; one that follows a schedule goes along with what trains.
        learning = phase.pruner or not pruner.learned
        pruner.set_progress(progress if learning else 1.0)  # type: ignore[operator]
        pruner.train(learning)
    with ExitStack() as stack:
        full = phase.full(module.global_step) if full is None else full
        stack.enter_context(mode(module.model, "mask" if full else "drop"))
        if phase.schedule.moves:
            stack.enter_context(layers(module.model, step_layers(module, phase, progress)))
        yield
