"""Budget schedules in other training loops than `tpcompress fit`: a context for one step, a transformers callback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tpcompress.insertion.attach import attachment_of, budgets, layers
from tpcompress.training.schedules import Schedule, draw_for, progress_at
from tpcompress.training.step_values import step_budgets, step_layers


@contextmanager
def schedule_step(model: nn.Module, schedule: Schedule, progress: float, draw: float = 0.5) -> Iterator[None]:
    """Run one training step at the budgets and layers of a schedule.

        for step, batch in enumerate(batches):
            with schedule_step(model, Linear(start=9), progress_at(step, num_steps)):
                model(**batch).loss.backward()

    A schedule with several passes per step (Sandwich, Matryoshka) contributes one of them, selected by `draw`.

    Args:
        model: with a plan attached.
        schedule: budget and layer over training.
        progress: completed share of training: 0 at the first step, 1 at the last.
        draw: random number in [0, 1), equal on all ranks, new at every step.

    Raises:
        ValueError: no plan attached, or progress or draw out of range.
    """
    if not 0 <= progress <= 1 or not 0 <= draw < 1:
        raise ValueError(f"progress must be in [0, 1] and draw in [0, 1), got {progress} and {draw}.")
    attached = attachment_of(model)
    passes = step_budgets(attached.plan, schedule, progress, draw)
    chosen = passes[int(draw * len(passes))]
    for pruner in attached.pruners:
        pruner.set_progress(progress)  # type: ignore[operator]
    with ExitStack() as stack:
        stack.enter_context(budgets(model, chosen))
        if schedule.moves:
            values = step_layers(attached.plan, schedule, len(attached.parts.layers), progress)
            stack.enter_context(layers(model, values))
        yield


class ScheduleCallback(TrainerCallback):
    """Applies a schedule in transformers' `Trainer` and subclasses: `Trainer(..., callbacks=[ScheduleCallback(s)])`.

    Every optimizer step, with all its accumulated batches, runs at the budgets of the schedule; evaluation and the
    trained model have the plan's own.

    Args:
        schedule: budget and layer over training.
        seed: seed of schedules that draw.
    """

    def __init__(self, schedule: Schedule, seed: int = 0) -> None:
        self.schedule, self.seed = schedule, seed
        self.stack = ExitStack()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restore the plan's budgets if an earlier run was interrupted within a step."""
        self.stack.close()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the budgets of the step."""
        draw = draw_for(self.seed, state.global_step).random()
        progress = progress_at(state.global_step, state.max_steps)
        self.stack.close()
        self.stack.enter_context(schedule_step(kwargs["model"], self.schedule, progress, draw))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Restore the plan's budgets."""
        self.stack.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the plan's budgets and set pruners with a schedule to its end, as in an export."""
        self.stack.close()
        for pruner in attachment_of(kwargs["model"]).pruners:
            pruner.set_progress(1.0)  # type: ignore[operator]
