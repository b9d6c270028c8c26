"""One training step: mode, budgets and layers of its forward calls, and the losses of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tpcompress.insertion.attach import attachment_of, is_attached, layers, mode
from tpcompress.training.context import StepContext
from tpcompress.training.losses import needs_of, weighed
from tpcompress.training.losses.base import at
from tpcompress.training.passes import Pass, run_pass
from tpcompress.training.phases import NO_GRADIENT_REACHES_PRUNER, Phase
from tpcompress.training.step_values import step_budgets, step_layers
from tpcompress.training.teachers import Teacher


def student_passes(
    ctx: StepContext,
    phase: Phase,
    teacher: Teacher | None,
    batch: Mapping[str, Any],
    draw: float,
    blank_image: bool = False,
) -> list[tuple[Pass, dict[str, Tensor]]]:
    """The forward calls of a step, one per budget of its schedule, each with its weighted losses.

    Args:
        ctx: the run at this step.
        phase: phase of the step.
        teacher: teacher of the run.
        batch: output of the collator.
        draw: random number in [0, 1) of the step, equal on all ranks.
        blank_image: the only image of the batch was added by `with_blank_image`; losses must not see its selection.
    """
    progress = phase.progress(ctx.step)
    needs, done = needs_of(phase.losses, progress), []
    for values in step_budgets(ctx.plan, phase.schedule, progress, draw):
        with pruning(ctx, phase, progress):
            student = run_pass(ctx.model, batch, values, own="own" in needs)
        student.per_sample = ctx.per_sample
        if blank_image:
            student = replace(student, trace=None)
        taught = None
        if "teacher" in needs and teacher is not None:
            taught = teacher(ctx, batch, student, progress)
        done.append((student, weighed(phase.losses, student, taught, progress)))
    return done


def mean_terms(passes: Sequence[tuple[Pass, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Terms of a step by name, fp32: the mean over its forward calls."""
    terms: dict[str, Tensor] = {}
    for _, losses in passes:
        for name, value in losses.items():
            share = value.float() / len(passes)
            terms[name] = terms[name] + share if name in terms else share
    return terms


def check_gradient_reaches_pruner(
    ctx: StepContext, phase: Phase, passes: Sequence[tuple[Pass, dict[str, Tensor]]]
) -> None:
    """Refuse a loss without a gradient in a step in which a learned pruner trains alone and made a selection.

    Args:
        ctx: the run at this step.
        phase: phase of the step.
        passes: results of `student_passes`, none of whose losses requires a gradient.

    Raises:
        ValueError: the pruner would never be trained.
    """
    progress = phase.progress(ctx.step)
    # Steps that gather, and losses whose weight is 0 for now, have no gradient by design.
    may_come = phase.full_every > 1 or not all(at(loss.weight, progress) for loss in phase.losses)
    if not phase.pruner or phase.rest or may_come or not any(losses for _, losses in passes):
        return
    pruners = attachment_of(ctx.model).pruners
    stages = [stage for student, _ in passes if student.trace is not None for stage in student.trace.stages]
    if any(stage.selection is not None and any(stage.vision_in) and pruners[stage.stage].learned for stage in stages):
        raise ValueError(NO_GRADIENT_REACHES_PRUNER)


def set_progress_done(model: nn.Module) -> None:
    """Set the progress of all pruners to 1, as in an export, so that pruners with a schedule are at its end.

    The next training step sets the progress again.
    """
    for pruner in attachment_of(model).pruners if is_attached(model) else []:
        pruner.set_progress(1.0)  # type: ignore[operator]


@contextmanager
def pruning(ctx: StepContext, phase: Phase, progress: float, full: bool | None = None) -> Iterator[None]:
    """Run a block with the mode, the layers and the pruners' progress of a training step.

    Args:
        ctx: the run at this step.
        phase: phase of the step.
        progress: share of the phase that is done.
        full: run at full length, through gates; None to derive it from the step.
    """
    if ctx.plan is None:
        yield
        return
    for pruner in attachment_of(ctx.model).pruners:
        # A trained pruner that is frozen selects as in the export; a pruner with a schedule follows this phase.
        learning = phase.pruner or not pruner.learned
        pruner.set_progress(progress if learning else 1.0)  # type: ignore[operator]
        pruner.train(learning)
    with ExitStack() as stack:
        full = phase.full(ctx.step) if full is None else full
        stack.enter_context(mode(ctx.model, "mask" if full else "drop"))
        if phase.schedule.moves:
            values = step_layers(ctx.plan, phase.schedule, len(ctx.parts.layers), progress)
            stack.enter_context(layers(ctx.model, values))
        yield
