"""The two phases of a run: first a learned pruner trains alone, then the rest trains with the pruner in the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.losses import Loss
from tpcompress.training.schedules import Constant, Schedule, progress_at

NO_GRADIENT_REACHES_PRUNER = (
    "The pruner trains, but no loss depends on its selection: its selector and applier carry no gradient. Use applier "
    "gather_value or noise, or a loss on selections such as Imitate, or ScoreFunction with gumbel_topk."
)


@dataclass(frozen=True)
class PrunerPhase:
    """Phase one: the learned pruner trains alone, with everything else frozen.

    Attributes:
        steps: optimizer steps of the phase, or its share of the run if below 1. null: half of the run if the plan has
            a learned pruner (the whole run if nothing else trains, 0 if `train` contains `pruner`), else 0.
        schedule: budget schedule of the phase; null for the plan's budgets. Random budgets help a question-conditioned
            scorer.
        losses: losses of the phase; null for those of the model.
        full_every: as in the model; null for 1, or 0 for a pruner that trains on the pruned sequence.

    Raises:
        ValueError: `steps` that is neither a count nor a share, an empty list of losses, or an invalid `full_every`.
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
            plan: pruning plan of the run.
            total: optimizer steps of the run.
            train: parts that train in phase two.
            rest: whether weights other than the pruner's train.

        Raises:
            ValueError: more steps than the run has, 0 steps for a learned pruner that phase two does not train, or a
                phase two in which nothing trains.
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
                f"model.pruner_phase.steps out, or set model.train."
            )
        return steps


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of a run in which the same weights train.

    Attributes:
        start: first optimizer step.
        end: last optimizer step, excluded.
        pruner: whether the pruner trains.
        rest: whether the other trainable weights of the recipe train.
        full_every: 0 trains on the pruned sequence in every step, 1 at full length through gates, m at full length in
            every m-th step.
        schedule: budget schedule.
        losses: losses of the phase, without losses on gates if the pruner does not train.
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
        """Whether a step runs at full length: the first of every `full_every` steps."""
        return self.full_every > 0 and (step - self.start) % self.full_every == 0


def phases_of(
    plan: PruningPlan | None,
    total: int,
    train: set[str],
    rest: bool,
    pruner_phase: PrunerPhase,
    main: tuple[int, Schedule | None, list[Loss]],
) -> list[Phase]:
    """The phases of a run that have steps.

    Args:
        plan: pruning plan of the run.
        total: optimizer steps of the run.
        train: parts that train in phase two.
        rest: whether weights other than the pruner's train.
        pruner_phase: settings of phase one.
        main: full_every, schedule and losses of phase two.

    Raises:
        ValueError: invalid numbers of steps, a phase without a loss, or one in which no gradient reaches the pruner.
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
                "full_every to 1, or to 4 for one step in four, or use applier gather_value."
            )
        idle = plan is not None and any(
            stage.pruner.learned and not stage.pruner.trains_through_model for stage in plan.stages
        )
        if phase.pruner and idle and not any("gate" in loss.needs for loss in phase.losses):
            raise ValueError(NO_GRADIENT_REACHES_PRUNER)
    return found


def steps_alone(phases: list[Phase]) -> int:
    """Optimizer steps in which the pruner trains alone."""
    return sum(phase.end - phase.start for phase in phases if phase.pruner and not phase.rest)


def check_alone(phases: list[Phase], resumed: Mapping[str, Any]) -> None:
    """Check that a resumed run assigns the steps that are done to the same phases.

    A share of the run, such as the default of one half, gives another number of steps in a longer run.

    Args:
        phases: phases of the run that resumes.
        resumed: `step` done, and steps `alone` of the pruner, in the checkpoint; empty for a new run.

    Raises:
        ValueError: the pruner phase ends at another step.
    """
    then, now, done = resumed.get("alone"), steps_alone(phases), resumed.get("step", 0)
    if then is not None and min(then, done) != min(now, done):
        raise ValueError(
            f"In the checkpoint's run the pruner trained alone for {then} steps, in this one for {now} of "
            f"{phases[-1].end}; set model.pruner_phase.steps: {then} to resume it."
        )


def _without_gates(phase: Phase) -> Phase:
    """A phase without losses on gates, which would train the hidden states that a frozen pruner reads instead."""
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
    """Whether a learned pruner of the plan gets a gradient at full length only."""
    return plan is not None and any(s.pruner.learned and not s.pruner.trainable_when_cut for s in plan.stages)


def check_full_every(value: int) -> int:
    """The value, if it is a number of steps.

    Raises:
        ValueError: it is negative or not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"full_every is a whole number of at least 0, got {value!r}; 4 is one step in four.")
    return value
