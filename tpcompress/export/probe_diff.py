"""Two probes of the same input, stage by stage: where do they part first?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcompress.export.probe import Probe


@dataclass(frozen=True)
class StageCheck:
    """One stage of the replay beside the trained model.

    Attributes:
        stage: index in the plan.
        layer, trained_layer: where it acts, and where it acted; None where there is no such stage.
        retained, trained: tokens retained in the probe, now and then.
        agree: tokens retained in both.
    """

    stage: int
    layer: int | None
    trained_layer: int | None
    retained: int
    trained: int
    agree: int

    @property
    def ok(self) -> bool:
        """The stage retains the same tokens at the same layer."""
        return self.layer == self.trained_layer and self.retained == self.trained == self.agree

    def __str__(self) -> str:
        if self.layer is None:
            return f"stage {self.stage} (layer {self.trained_layer}): it is missing"
        where = f"stage {self.stage} (layer {self.layer})"
        if self.trained_layer is None:
            return f"{where}: the trained model had no such stage"
        if self.layer != self.trained_layer:
            return f"{where}: trained at layer {self.trained_layer}"
        if self.retained != self.trained:
            return f"{where}: {self.retained} vision tokens retained instead of {self.trained}"
        return f"{where}: {self.agree} of {self.trained} retained positions agree"


@dataclass(frozen=True)
class Comparison:
    """A replay beside the trained model.

    Attributes:
        stages: stage by stage.
        logit_gap, tolerance: largest difference of the first new token's logits, and what is allowed.
        tokens_agree: the greedy continuation is the same.
    """

    stages: tuple[StageCheck, ...]
    logit_gap: float
    tolerance: float
    tokens_agree: bool

    @classmethod
    def of(cls, trained: Probe, now: Probe) -> Comparison:
        """Compare a replay with what was stored."""
        number = range(max(len(trained.retained), len(now.retained)))
        same = now.tokens.shape == trained.tokens.shape and torch.equal(now.tokens, trained.tokens)
        # Half precision may break a tie of two words otherwise; what comes after the first one is then no evidence.
        exact = trained.about["dtype"] == "float32"
        largest = max(1.0, trained.logits.abs().max().item())
        return cls(
            tuple(_stage(n, trained, now) for n in number),
            (now.logits - trained.logits).abs().max().item(),
            trained.about["tolerance"] * largest,
            same or not exact,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Comparison:
        """The inverse of `dataclasses.asdict`."""
        return cls(**values | {"stages": tuple(StageCheck(**stage) for stage in values["stages"])})

    @property
    def differs(self) -> str | None:
        """Where the two part first, in words; None if they do not."""
        gap = f"max logit gap {self.logit_gap:.2g}"
        first = next((stage for stage in self.stages if not stage.ok), None)
        if first is not None:
            return f"at {first}; {gap}"
        if not self.logit_gap <= self.tolerance:
            return f"after the last stage: all retained positions agree; {gap}"
        if not self.tokens_agree:
            return f"in decoding: all retained positions and the first logits agree; {gap}"
        return None


def _stage(number: int, trained: Probe, now: Probe) -> StageCheck:
    def part(of: Probe) -> tuple[int | None, Tensor | None]:
        there = number < len(of.retained)
        return (of.about["stages"][number]["layer"], of.retained[number]) if there else (None, None)

    (layer, is_), (trained_layer, was) = part(now), part(trained)
    agree = int((is_ & was).sum()) if is_ is not None and was is not None and is_.shape == was.shape else 0
    retained, before = (0 if x is None else int(x.sum()) for x in (is_, was))
    return StageCheck(number, layer, trained_layer, retained, before, agree)
