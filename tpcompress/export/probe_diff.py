"""Comparison of two probes of the same input, stage by stage: the first difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcompress.export.probe import Probe, tolerance


@dataclass(frozen=True)
class StageCheck:
    """One stage of a replay against the recorded model.

    Attributes:
        stage: index in the plan.
        layer: layer in the replay; None without such a stage.
        trained_layer: layer in the recorded model; None without such a stage.
        retained: number of tokens retained in the replay.
        trained: number of tokens retained by the recorded model.
        agree: number of tokens retained by both.
        total: vision tokens of the probe.
    """

    stage: int
    layer: int | None
    trained_layer: int | None
    retained: int
    trained: int
    agree: int
    total: int

    @property
    def ok(self) -> bool:
        """Whether the stage retains the same tokens at the same layer."""
        return self.layer == self.trained_layer and self.retained == self.trained == self.agree

    def __str__(self) -> str:
        if self.layer is None:
            return f"stage {self.stage} (layer {self.trained_layer}): it is missing"
        where = f"stage {self.stage} (layer {self.layer})"
        if self.trained_layer is None:
            return f"{where}: the recorded model had no such stage"
        if self.layer != self.trained_layer:
            return f"{where}: recorded at layer {self.trained_layer}"
        if self.retained != self.trained:
            return f"{where}: {self.retained} vision tokens retained instead of {self.trained}"
        return f"{where}: {self.agree} of {self.trained} retained positions agree"


@dataclass(frozen=True)
class ProbeDiff:
    """A replay against the recorded model.

    Attributes:
        stages: one check per stage.
        logit_gap: largest difference of the first new token's logits.
        tolerance: largest allowed `logit_gap`.
        tokens_agree: whether the greedy continuation is the same (always True outside float32).
    """

    stages: tuple[StageCheck, ...]
    logit_gap: float
    tolerance: float
    tokens_agree: bool

    @classmethod
    def of(cls, trained: Probe, now: Probe) -> ProbeDiff:
        """Compare a replay with the stored probe."""
        number = range(max(len(trained.retained), len(now.retained)))
        same = now.tokens.shape == trained.tokens.shape and torch.equal(now.tokens, trained.tokens)
        # Half precision may break a tie of two tokens differently; the continuation after it is then no evidence.
        exact = trained.about["dtype"] == "float32"
        largest = max(1.0, trained.logits.abs().max().item())
        return cls(
            tuple(_stage(n, trained, now) for n in number),
            (now.logits - trained.logits).abs().max().item(),
            tolerance(trained.about) * largest,
            same or not exact,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ProbeDiff:
        """Rebuild a difference from `dataclasses.asdict`."""
        return cls(**values | {"stages": tuple(StageCheck(**stage) for stage in values["stages"])})

    @property
    def prunes(self) -> bool:
        """Whether the replay dropped a vision token."""
        return bool(self.stages) and self.stages[-1].retained < self.stages[-1].total

    @property
    def differs(self) -> str | None:
        """Description of the first difference; None if there is none."""
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
    listed = (trained if number < len(trained.retained) else now).about["stages"]
    return StageCheck(number, layer, trained_layer, retained, before, agree, sum(listed[number]["vision_tokens"]))
