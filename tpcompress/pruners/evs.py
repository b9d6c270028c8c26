"""EVS: retain the first frame, then what changed since the frame before (arXiv 2510.14624)."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import place_inside
from tpcompress.pruners.frames import cell_before, cell_change
from tpcompress.pruners.topk import central, grid_cells, keep_topk, on, rank


class EVS(Pruner):
    """d(v) = 1 - cos(x_v, x_u), u the token of the same cell of the frame before; 255 where there is no such token, as
    in the first frame. keep = the budget's tokens of largest d.

    With `rate` q, the share to be pruned, a video of T frames of n tokens retains max(n, floor(T n (1 - q))) of them
    whatever the budget: a number known from the size of the video before any frame is encoded (`retained_count`), and
    never less than the first frame. The floor is that of the exact number; `compat` takes that of the product in
    floating point, as the official code does, which is one less at some rates. An image has one frame: with a rate it
    is retained whole.

    Without a rate the budget of the stage holds. What of it is less than a frame is spread over the first frame as
    `uniform` does, so an image, which has no frame before, is pruned as by `uniform`.

    needs  nothing.     gives  keep_BV, scores_BV = d, above all others for a first frame.
    Paper: q = 0.7 for Nemotron, which was trained with it; other models untrained. Original positions.
    Cost: one sort of V to find the frames before, and one pass over the features.
    Unlike the official code: d is computed in fp32 whatever the model's dtype; several videos of a row count each for
    itself; a cell whose predecessor an earlier stage dropped counts as new.
    """

    name = "evs"
    paper = "2510.14624"
    group = "video"
    paper_plan = """
    # EVS: 70 % of a video's tokens pruned before the language model, the first frame whole, in positions of the whole
    # video. The official count instead of the exact share: {type: evs, rate: 0.7}
    stages:
      - {pruner: evs, layer: 0, keep_ratio: 0.3}
    """
    inexact_arguments = ({"rate": 0.7}, {"rate": 0.9, "compat": True})

    def __init__(self, rate: float | None = None, compat: bool = False) -> None:
        super().__init__()
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(f"evs needs a rate in [0, 1), the share of tokens to be pruned, got {rate}.")
        if compat and rate is None:
            raise ValueError("evs rounds as the official code only with a rate; set rate, or leave compat out.")
        self.rate, self.compat = rate, compat
        self.exact_count = rate is None

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        valid_BV = tokens.valid_BV
        before_BV, exists_BV = cell_before(
            tokens.row_BV, tokens.col_BV, tokens.tile_BV, tokens.image_BV, valid_BV, tokens.canvas
        )
        if tokens.video_BV is not None:
            exists_BV &= tokens.video_BV
        change_BV = cell_change(tokens.vision_BVD, before_BV).masked_fill(~exists_BV, 0.0)
        first_BV = valid_BV & ~exists_BV
        if self.rate is not None:
            scores_BV = torch.where(exists_BV, change_BV, 255.0)
            place_BV, video_BV = place_inside(rank(scores_BV, valid_BV), tokens.image_BV, valid_BV)
            size_BV, least_BV = (
                torch.zeros_like(video_BV).scatter_add(1, video_BV, x_BV.long()).gather(1, video_BV)
                for x_BV in (valid_BV, first_BV)
            )
            return Selection((place_BV < self._count(size_BV, least_BV)) & valid_BV, scores_BV)
        slots_B1 = on(num_keep_B, change_BV)[:, None].minimum(first_BV.sum(1, keepdim=True))
        cell_BV = grid_cells(tokens.row_BV, tokens.col_BV, first_BV, slots_B1[:, 0])
        spread_BV = central(cell_BV, tokens.row_BV, tokens.col_BV, first_BV)
        scores_BV = torch.where(exists_BV, change_BV, torch.where(spread_BV, 255.0, 254.0))
        return Selection(keep_topk(scores_BV, valid_BV, num_keep_B), scores_BV)

    def _count(self, size_BV: Tensor, least_BV: Tensor) -> Tensor:
        """How many tokens each token's video retains."""
        assert self.rate is not None
        if self.compat:
            return (size_BV.double() * (1.0 - self.rate)).long().maximum(least_BV)
        kept = 1 - Fraction(str(self.rate))
        return (size_BV * kept.numerator // kept.denominator).maximum(least_BV)


def retained_count(tokens_per_frame: int, num_frames: int, rate: float, compat: bool = False) -> int:
    """max(n, floor(T n (1 - q))): what EVS retains of a video, from its size alone.

    Args:
        tokens_per_frame: n.
        num_frames: T.
        rate: q, the share to be pruned, in [0, 1).
        compat: round the product in floating point, as the official code does.
    """
    total = tokens_per_frame * num_frames
    kept = int(total * (1.0 - rate)) if compat else int(total * (1 - Fraction(str(rate))))
    return max(tokens_per_frame, kept)
