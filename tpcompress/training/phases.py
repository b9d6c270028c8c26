"""The two phases of a run: first a learned pruner alone, then everything else with the pruner in its loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.losses import Loss
from tpcompress.training.schedules import Constant, Schedule, progress_at

NO_GRADIENT_REACHES_PRUNER = (
    "The pruner trains, but no loss depends on its choice: its selector and applier carry no gradient. Take applier "
    "gather_value or noise, or a loss on choices such as Imitate, or ScoreFunction with gumbel_topk."
)


@dataclass(frozen=True)
class PrunerPhase:
    """Phase one: the learned pruner, alone, through gates that a gradient passes.

    Attributes:
        steps: optimizer steps of the phase, or its share of the run if below 1; null takes half the run if the plan has
            something to learn (all of it if nothing else trains, none if `train` names the pruner), else none.
        schedule: budgets of the phase; null keeps the plan's. Random budgets help a question-conditioned scorer.
        losses: of the phase; null takes the model's.
        full_every: as the model's; null takes 1, or 0 for a pruner that learns on gathered tokens.

    Raises:
        ValueError: steps that are no count and no share, an empty list of losses, or an impossible `full_every`.
    """

    steps: int | float | None = None
    schedule: Schedule | None = None
    losses: list[Loss] | None = None
    full_every: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and (self.steps < 0 or (self.steps > 1 and self.steps != int(self.steps))):
            raise ValueError(f"pruner_phase.steps is a whole number of steps or a share below 1, got {self.steps}.")
        if self.losses is not None and not self.losses:
            raise ValueError("pruner_phase.losses is empty; leave it out for the model's, or name one, e.g. [Label].")
        if self.full_every is not None:
            check_full_every(self.full_every)

    def count(self, plan: PruningPlan | None, total: int, train: set[str], rest: bool) -> int:
        """Optimizer steps of phase one in a run of `total`.

        Args:
            plan: of the run.
            total: optimizer steps.
            train: the parts that train in phase two.
            rest: whether anything but the pruner trains at all.

        Raises:
            ValueError: more steps than the run has, none although a pruner must learn and phase two does not train
                it, or a phase two in which nothing trains.
        """
        if not is_learned(plan):
            return 0
        jointly = "pruner" in train
        if self.steps is None:
            steps = 0 if jointly else total // 2 if rest else total
        else:
            steps = int(self.steps if self.steps >= 1 else self.steps * total)
        if steps > total or steps < (0 if jointly else 1):
            raise ValueError(
                f"The pruner phase has {steps} of {total} steps; set model.pruner_phase.steps between 1 and {total}."
            )
        if steps < total and not rest and not jointly:
            raise ValueError(
                f"Nothing trains from step {steps} of {total} on: train is empty and there is no lora; leave "
                f"model.pruner_phase.steps out, or say what else trains."
            )
        return steps


@dataclass(frozen=True)
class Phase:
    """A stretch of a run.

    Attributes:
        start, end: its optimizer steps, `end` excluded.
        pruner: whether the pruner trains.
        rest: whether everything else does that the recipe trains.
        full_every: 0 gathers the retained tokens in every step, 1 trains at full length through gates, m does so in
            every m-th step.
        schedule: of the budgets.
        losses: what is minimised; none that needs a pruner which trains, where none does.
    """

    start: int
    end: int
    pruner: bool
    rest: bool
    full_every: int
    schedule: Schedule
    losses: list[Loss]

    def progress(self, step: int) -> float:
        """Share of the phase that is done: 0 at its first step, 1 at its last."""
        return progress_at(step - self.start, self.end - self.start)

    def full(self, step: int) -> bool:
        """Whether a step sees the full length. The first of every `full_every` does."""
        return self.full_every > 0 and (step - self.start) % self.full_every == 0


def phases_of(
    plan: PruningPlan | None,
    total: int,
    train: set[str],
    rest: bool,
    pruner_phase: PrunerPhase,
    main: tuple[int, Schedule | None, list[Loss]],
) -> list[Phase]:
    """The phases of a run; none is empty.

    Args:
        plan: of the run.
        total: optimizer steps.
        train: the parts that train.
        rest: whether anything but the pruner trains at all.
        pruner_phase: settings of phase one.
        main: full_every, schedule and losses of phase two.

    Raises:
        ValueError: impossible numbers of steps, a phase in which nothing would reach the pruner that trains, or one
            without a loss.
    """
    first, (full_every, schedule, losses) = pruner_phase.count(plan, total, train, rest), main
    alone = int(wants_full_length(plan)) if pruner_phase.full_every is None else pruner_phase.full_every
    own = losses if pruner_phase.losses is None else pruner_phase.losses
    found = [
        Phase(0, first, True, False, alone, pruner_phase.schedule or Constant(), own),
        Phase(first, total, "pruner" in train, rest, full_every, schedule or Constant(), losses),
    ]
    found = [phase if phase.pruner else _without_gates(phase) for phase in found]
    found = [phase for phase in found if phase.end > phase.start]
    for phase in found:
        if phase.pruner and wants_full_length(plan) and phase.full_every == 0:
            raise ValueError(
                "The pruner trains, but its gates carry a gradient at full length only and full_every is 0; set "
                "full_every to 1, or to 4 for one step in four, or take applier gather_value."
            )
        idle = plan is not None and any(
            stage.pruner.learned and not stage.pruner.trains_through_model for stage in plan.stages
        )
        if phase.pruner and idle and not any("gate" in loss.needs for loss in phase.losses):
            raise ValueError(NO_GRADIENT_REACHES_PRUNER)
    return found


def steps_alone(phases: list[Phase]) -> int:
    """Steps of the phase in which the pruner trains alone."""
    return sum(phase.end - phase.start for phase in phases if phase.pruner and not phase.rest)


def check_alone(phases: list[Phase], resumed: Mapping[str, Any]) -> None:
    """See that the steps a checkpoint has done belong to the phases in which they were done.

    A share of the run, such as the half that is the default, is another number of steps in a longer run.

    Args:
        phases: of the run that goes on.
        resumed: `step` done and `alone`, the pruner's steps, of the checkpoint's run; empty for a new run.

    Raises:
        ValueError: the pruner's phase ends elsewhere.
    """
    then, now, done = resumed.get("alone"), steps_alone(phases), resumed.get("step", 0)
    if then is not None and min(then, done) != min(now, done):
        raise ValueError(
            f"The checkpoint is of a run whose pruner trained alone for {then} steps, this one has {now} of "
            f"{phases[-1].end}; set model.pruner_phase.steps: {then} to go on with it."
        )


def _without_gates(phase: Phase) -> Phase:
    """A phase without the losses on choices: of a pruner that does not train they would move what it reads instead."""
    left = [loss for loss in phase.losses if "gate" not in loss.needs]
    if phase.losses and not left and phase.end > phase.start:
        raise ValueError(
            f"Loss '{phase.losses[0].name}' needs a pruner that trains, and from step {phase.start} on none does; add "
            f"Label to model.losses, or move it to model.pruner_phase.losses."
        )
    return replace(phase, losses=left)


def is_learned(plan: PruningPlan | None) -> bool:
    """Whether a pruner of the plan has weights."""
    return plan is not None and any(stage.pruner.learned for stage in plan.stages)


def wants_full_length(plan: PruningPlan | None) -> bool:
    """Whether a learned pruner of the plan gets its gradient at full length only."""
    return plan is not None and any(s.pruner.learned and not s.pruner.trainable_when_cut for s in plan.stages)


def check_full_every(value: int) -> int:
    """See that it is a count of steps.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"full_every is a whole number of at least 0, got {value!r}; 4 is one step in four.")
    return value
