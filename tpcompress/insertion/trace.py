"""Record of a call: vision tokens in and out, sequence lengths and retained tokens of every stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tpcompress.families import Layout
from tpcompress.pruners import Selection, TokenView


@dataclass(frozen=True, eq=False)
class StageTrace:
    """What one stage did in one prefill. R budget rows, V vision tokens, B samples.

    Attributes:
        stage: index in the plan.
        layer: first decoder layer with the pruned sequence.
        total: vision tokens of each row that the projector produced.
        vision_in, vision_out: vision tokens of each row before and after the stage, padding excluded.
        sequence_in, sequence_out: columns of the batch before and after the stage.
        retained_RV: bool, which of the projector's tokens each row still has.
        owner: sample of each row.
        layouts: layouts of each row's tokens: one image, video or tile, or all of a prompt.
        view, selection: input and output of the pruner; None if it was skipped, because the budget kept everything or
            no token was left. An empty row among others showed one dummy token.
        num_images: images and videos of the call, whatever the scope of the plan; 0 where it is not known.
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
    num_images: int = 0

    @property
    def per_image(self) -> float:
        """Mean number of vision tokens per image or video after the stage."""
        return sum(self.vision_out) / (self.num_images or len(self.total))

    @property
    def per_sequence(self) -> float:
        """Mean number of vision tokens per sample with an image after the stage."""
        return sum(self.vision_out) / len(set(self.owner))


@dataclass(eq=False)
class Trace:
    """Everything that was recorded inside one `record` block, in the order of the prefills.

    Attributes:
        stages: one entry per stage and prefill.
        labels_BN: labels that the loss of the last call read, shortened like its logits; None without labels.
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
