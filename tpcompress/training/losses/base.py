"""The base class of losses, their weights over a phase, and what losses on gates and selections read.

R budget rows, V vision tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tpcompress.families import Parts
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.trace import StageTrace
from tpcompress.pruners import Selection, TokenView
from tpcompress.training.passes import Pass


@dataclass(frozen=True)
class Ramp:
    """A value that moves linearly over a phase and then stays constant.

    Attributes:
        start: value at the first step of the phase.
        end: value from `until` on.
        until: share of the phase, in (0, 1], at which `end` is reached.

    Raises:
        ValueError: a value that is not finite, or `until` outside (0, 1].
    """

    start: float
    end: float
    until: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end) and 0 < self.until <= 1):
            raise ValueError(
                f"A ramp needs finite start and end and until in (0, 1], got {self.start}, {self.end}, {self.until}."
            )

    def at(self, progress: float) -> float:
        """The value when this share of the phase is done."""
        return self.start + (self.end - self.start) * min(1.0, progress / self.until)


def at(value: float | Ramp, progress: float) -> float:
    """A number or a ramp, when this share of the phase is done."""
    return value.at(progress) if isinstance(value, Ramp) else float(value)


class Loss:
    """One term of the training objective.

    Subclasses set `name`, the word in logs (`loss/<name>`), list what they read in `needs`, and define `__call__`.
    A loss on answer tokens averages them with `student.answer_mean`, which follows the recipe's `average_over`.

    Args:
        weight: factor on the term: a number, or a ramp over the phase.

    Raises:
        ValueError: a weight below 0.
    """

    name: ClassVar[str]

    test_arguments: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Arguments with which the contract tests run the loss: one entry per branch through its code."""

    def __init__(self, weight: float | Ramp = 1.0) -> None:
        lowest = min(weight.start, weight.end) if isinstance(weight, Ramp) else weight
        if not (math.isfinite(lowest) and lowest >= 0):
            raise ValueError(f"Loss '{self.name}' has weight {lowest}; give a number of at least 0.")
        self.weight = weight

    @property
    def needs(self) -> frozenset[str]:
        """What the loss reads beside the student's logits and hidden states.

        Any of "teacher" (the teacher's pass), "gate" (gates, scores or log probabilities of a learned pruner, with a
        gradient) and "own" (`Pass.own_AC`).
        """
        return frozenset()

    def prepare(self, model: nn.Module, parts: Parts, plan: PruningPlan | None) -> None:
        """Called once, before training. Most losses do not override it.

        Args:
            model: the model that trains, with LoRA and the plan attached.
            parts: its decoder layers, last norm and text config among them.
            plan: the pruning plan; None for a dense run.

        Raises:
            ValueError: the loss does not work with this model or plan.
        """

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        """The term without its weight, fp32 (); None if the pass contains nothing that the loss measures.

        Args:
            student: the forward call that is trained.
            teacher: the teacher's forward call on the same batch; None without "teacher" in `needs`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(student, teacher) -> Tensor | None.")


def weighed(losses: Sequence[Loss], student: Pass, teacher: Pass | None, progress: float) -> dict[str, Tensor]:
    """Weighted terms by name, without those whose weight is 0 at this point of the phase; equal names are added."""
    terms: dict[str, Tensor] = {}
    for loss in losses:
        weight = at(loss.weight, progress)
        term = loss(student, teacher) if weight else None
        if term is not None:
            terms[loss.name] = terms[loss.name] + weight * term if loss.name in terms else weight * term
    return terms


def needs_of(losses: Sequence[Loss], progress: float) -> frozenset[str]:
    """Union of the `needs` of all losses whose weight is above 0 at this point of the phase."""
    return frozenset().union(*(loss.needs for loss in losses if at(loss.weight, progress)))


# ------------------------------------------------------------------ what losses on gates and selections read


@dataclass(frozen=True, eq=False)
class PrunedStage:
    """One stage whose pruner ran. A row without a vision token holds a dummy token, which counts nowhere.

    Attributes:
        trace: counts, layer and retained tokens of the stage.
        view: what the pruner read.
        selection: what the pruner returned.
        valid_RV: False on padding.
        real_R: False on rows without a vision token.
        num_real: number of rows with vision tokens.
        counts: number of tokens that the budget gives each row.
        num_keep_R: `counts` as int64 on the device.
    """

    trace: StageTrace
    view: TokenView
    selection: Selection
    valid_RV: Tensor
    real_R: Tensor
    num_real: int
    counts: list[int]
    num_keep_R: Tensor

    def gate_RV(self) -> Tensor:
        """The gates in fp32, 0 on padding."""
        assert self.selection.gate_BV is not None
        return self.selection.gate_BV.float().masked_fill(~self.valid_RV, 0.0)

    def expected(self) -> Tensor | None:
        """Expected number of retained tokens (R,), with a gradient: the selection's own, or the sum of the gates."""
        if self.selection.expected_B is not None:
            return self.selection.expected_B.float()
        return None if self.selection.gate_BV is None else self.gate_RV().sum(1)

    def row_mean(self, value_R: Tensor) -> Tensor:
        """Mean over the rows that have vision tokens."""
        return value_R.masked_fill(~self.real_R, 0.0).sum() / self.num_real

    def token_mean(self, value_RV: Tensor) -> Tensor:
        """Mean over the tokens of each row, then over rows."""
        count_R = self.valid_RV.sum(1).clamp(min=1)
        return self.row_mean(value_RV.masked_fill(~self.valid_RV, 0.0).sum(1) / count_R)


def pruned_stages(student: Pass) -> Iterator[PrunedStage]:
    """The stages of a pass whose pruner ran, in order."""
    for stage in student.trace.stages if student.trace is not None else []:
        if stage.selection is None or stage.view is None or not any(stage.vision_in):
            continue
        budget = student.budgets[stage.stage]
        counts = [min(budget.count(n), m) for n, m in zip(stage.total, stage.vision_in, strict=True)]
        valid_RV = stage.view.valid_BV
        real_R = torch.tensor([n > 0 for n in stage.vision_in]).to(valid_RV.device, non_blocking=True)
        yield PrunedStage(
            trace=stage,
            view=stage.view,
            selection=stage.selection,
            valid_RV=valid_RV,
            real_R=real_R,
            num_real=sum(n > 0 for n in stage.vision_in),
            counts=counts,
            num_keep_R=torch.tensor(counts).to(valid_RV.device, non_blocking=True),
        )


def stage_sum(terms: Sequence[Tensor]) -> Tensor | None:
    """Sum over stages; None without a term."""
    return torch.stack([term.float() for term in terms]).sum() if terms else None
