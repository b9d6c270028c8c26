"""What a loss is: a number from what one forward call left behind, and a weight over the phase's progress.

R budget rows, V vision tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tpcompress.insertion.trace import StageTrace
from tpcompress.pruners import Selection, TokenView
from tpcompress.training.passes import Pass


@dataclass(frozen=True)
class Ramp:
    """A number that moves in a straight line while a phase goes on, and then stays.

    Attributes:
        start: at the first step of the phase.
        end: from `until` on.
        until: share of the phase, in (0, 1], at which `end` is reached.
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
        """The number when this share of the phase is done."""
        return self.start + (self.end - self.start) * min(1.0, progress / self.until)


def at(value: float | Ramp, progress: float) -> float:
    """A number or ramp, when this share of the phase is done."""
    return value.at(progress) if isinstance(value, Ramp) else float(value)


class Loss:
    """One term of what training minimises.

    Subclasses set `name`, the word in logs (`loss/<name>`), list what they read in `needs`, and define `__call__`.

    Args:
        weight: what the term is multiplied by; a ramp over the phase's progress, or a number.

    Raises:
        ValueError: a weight below 0.
    """

    name: ClassVar[str]

    def __init__(self, weight: float | Ramp = 1.0) -> None:
        lowest = min(weight.start, weight.end) if isinstance(weight, Ramp) else weight
        if not (math.isfinite(lowest) and lowest >= 0):
            raise ValueError(f"Loss '{self.name}' has weight {lowest}; give a number of at least 0.")
        self.weight = weight

    @property
    def needs(self) -> frozenset[str]:
        """What the training step must provide beside its own forward call: any of "teacher" (the pass of a teacher),
        "gate" (a learned pruner whose gates, scores or draws carry a gradient) and "own" (`Pass.own_AC`)."""
        return frozenset()

    def prepare(self, module: Any) -> None:
        """Look at the LightningModule once its model stands. Most losses need not.

        Raises:
            ValueError: the loss cannot work with this model.
        """

    def __call__(self, here: Pass, taught: Pass | None) -> Tensor | None:
        """The term without its weight, fp32 (); None where it has nothing to say.

        Args:
            here: the forward call that is trained.
            taught: the teacher's; None without one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(here, taught) -> Tensor | None.")


def weighed(losses: Sequence[Loss], here: Pass, taught: Pass | None, progress: float) -> dict[str, Tensor]:
    """Every term that counts at this point of the phase, times its weight, by name; equal names add up."""
    terms: dict[str, Tensor] = {}
    for loss in losses:
        weight = at(loss.weight, progress)
        term = loss(here, taught) if weight else None
        if term is not None:
            terms[loss.name] = terms[loss.name] + weight * term if loss.name in terms else weight * term
    return terms


def needs_of(losses: Sequence[Loss], progress: float) -> frozenset[str]:
    """What the losses that count at this point of the phase need together."""
    return frozenset().union(*(loss.needs for loss in losses if at(loss.weight, progress)))


# ------------------------------------------------------------------ what losses on gates and on choices read


@dataclass(frozen=True, eq=False)
class Chosen:
    """One stage that asked its pruner. For a row without a vision token it saw a stand-in, which counts nowhere.

    Attributes:
        trace: what the stage did.
        view, selection: what the pruner saw and said.
        valid_RV: False on padding.
        real_R: False on rows without a vision token.
        num_real: how many rows have one.
        counts: how many tokens the budget gives each row.
        num_keep_R: the same as int64 on the device.
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
        """How many tokens (R,) the pruner expects to retain, with a gradient: as it says, or the sum of its gates."""
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


def chosen_stages(here: Pass) -> Iterator[Chosen]:
    """The stages of a pass that asked their pruner, in order."""
    for stage in here.trace.stages if here.trace is not None else []:
        if stage.selection is None or stage.view is None or not any(stage.vision_in):
            continue
        budget = here.budgets[stage.stage]
        counts = [min(budget.count(n), m) for n, m in zip(stage.total, stage.vision_in, strict=True)]
        valid_RV = stage.view.valid_BV
        came_R = torch.tensor([n > 0 for n in stage.vision_in]).to(valid_RV.device, non_blocking=True)
        yield Chosen(
            trace=stage,
            view=stage.view,
            selection=stage.selection,
            valid_RV=valid_RV,
            real_R=came_R,
            num_real=sum(n > 0 for n in stage.vision_in),
            counts=counts,
            num_keep_R=torch.tensor(counts).to(valid_RV.device, non_blocking=True),
        )


def stage_sum(terms: Sequence[Tensor]) -> Tensor | None:
    """Sum over stages; None if no stage had anything to say."""
    return torch.stack([term.float() for term in terms]).sum() if terms else None
