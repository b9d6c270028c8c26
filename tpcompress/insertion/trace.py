"""Per-call record: vision tokens in and out, sequence lengths and retained tokens of every stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from tpcompress.families import Layout
from tpcompress.pruners import Selection, TokenView

if TYPE_CHECKING:
    from tpcompress.insertion.hooks import Controller


@dataclass(frozen=True, eq=False)
class StageTrace:
    """What one stage did in one prefill. R budget rows, V vision tokens, B samples.

    Attributes:
        stage: index in the plan.
        layer: first decoder layer that sees fewer.
        total: vision tokens of each row out of the projector.
        vision_in, vision_out: vision tokens of each row before and after, as many as were really there.
        sequence_in, sequence_out: columns of the batch before and after.
        retained_RV: bool, which of the projector's tokens each row still has.
        owner: sample of each row.
        layouts: how the tokens of each row lie: one image or video, or all of a prompt.
        view, selection: what the pruner saw and said; None if it was not asked, because the budget kept everything or
            nothing was left. A row without tokens among others showed one stand-in.
    """

    stage: int
    layer: int
    total: list[int]
    vision_in: list[int]
    vision_out: list[int]
    sequence_in: int
    sequence_out: int
    retained_RV: Tensor
    owner: list[int]
    layouts: list[tuple[Layout, ...]]
    view: TokenView | None = None
    selection: Selection | None = None


@dataclass(eq=False)
class Trace:
    """Everything recorded inside one `record` block; prefills follow each other in `stages`.

    Attributes:
        stages: one entry per stage and prefill.
        labels_BN: labels as the last call's loss saw them, shortened like its logits; None without labels.
    """

    stages: list[StageTrace] = field(default_factory=list)
    labels_BN: Tensor | None = None

    def __str__(self) -> str:
        lines = [
            f"stage {s.stage} · layer {s.layer} · vision tokens {sum(s.vision_in)} -> {sum(s.vision_out)} "
            f"· sequence {s.sequence_in} -> {s.sequence_out}"
            for s in self.stages
        ]
        return "\n".join(lines) or "no vision token was pruned"


@contextmanager
def recording(controller: Controller) -> Iterator[Trace]:
    """Collect what the stages do while the block runs."""
    trace = Trace()
    controller.traces.append(trace)
    try:
        yield trace
    finally:
        controller.traces.remove(trace)
