"""Window merge: windows of similar neighbours become one token each (MustDrop's spatial merge, arXiv 2411.10803).

B rows, V tokens, D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import place_inside, places
from tpcompress.pruners.frames import frame_mean
from tpcompress.pruners.merging import group_sizes, merge_groups
from tpcompress.pruners.topk import SAME, central, on, take

METRICS = {"tower": frozenset({"tower_features"}), "tokens": frozenset[str]()}


class WindowMerge(Pruner):
    """Each tile or frame is cut into windows of `side` x `side` tokens; the similarity of a window is the mean cosine
    of its pairs. Windows merge into the token next to their middle, the most similar ones first, until the budget is
    left; the last one merges as many as are needed, those most like its middle. If windows do not suffice, windows of
    twice the side follow, of what is left, and so on, up to the whole row.

    With a `threshold` all windows of `side` whose similarity is at least that merge, whatever the budget.

    `metric: tower` compares the output of `layer` of the vision tower, `tokens` the tokens themselves. With
    `proportional` layers after the stage add the log of each group's size to the logits of its key.

    needs  tower_features with metric tower.     gives  keep_BV, scores_BV = - order in which tokens merge away (those
    that stay 1), vision_BVD; size_BV with proportional.
    Paper: 3 x 3 windows after the tower's first layer, threshold 0.8, LLaVA-1.5.
    Cost: a few passes over the features per doubling of the side, sorts of V.
    Unlike the official code: it merges at the stage, after the projector, what there goes through the rest of the tower
    as one token, so the tower does not become cheaper; merged tokens stay in their places (there in front); grids that
    windows do not divide; images of a batch do not share a count. A budget and larger windows are ours.
    """

    name = "window_merge"
    paper = "2411.10803"
    group = "merging"
    merges = True
    paper_plan = """
    # MustDrop's spatial merge: LLaVA-1.5's 576 tokens become 300 before the language model, the most similar windows of
    # 3 x 3 first. The official count follows from a threshold: {type: window_merge, threshold: 0.8}
    stages:
      - {pruner: window_merge, layer: 0, keep_tokens: 300}
    """
    test_arguments = ({"metric": "tokens", "side": 2, "proportional": True},)
    inexact_arguments = ({"threshold": 0.3, "metric": "tokens"},)

    def __init__(
        self,
        side: int = 3,
        threshold: float | None = None,
        metric: str = "tower",
        layer: int = 0,
        proportional: bool = False,
    ) -> None:
        super().__init__()
        if side < 2:
            raise ValueError(f"window_merge needs windows of a side of at least 2 tokens, got {side}.")
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"window_merge needs a threshold that is a cosine between -1 and 1, got {threshold}.")
        if metric not in METRICS:
            raise ValueError(f"window_merge has no metric '{metric}'; choose one of {', '.join(METRICS)}.")
        self.side, self.threshold, self.metric, self.layer = side, threshold, metric, layer
        self.proportional = proportional
        self.exact_count, self.uses_token_sizes = threshold is None, proportional

    @property
    def needs(self) -> frozenset[str]:
        return METRICS[self.metric]

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        with torch.no_grad():
            group_BV, step_BV = self._groups(tokens, num_keep_B)
        column_BV = torch.arange(group_BV.shape[1], device=group_BV.device).expand_as(group_BV)
        keep_BV = (group_BV == column_BV) & tokens.valid_BV
        most = int(num_keep_B.max()) if self.exact_count else group_BV.shape[1]
        vision_BVD = merge_groups(tokens.vision_BVD, group_BV, keep_BV, most)
        size_BV = group_sizes(group_BV).clamp(min=1).float() if self.proportional else None
        return Selection(keep_BV, torch.where(keep_BV, 1.0, -step_BV.float()), vision_BVD=vision_BVD, size_BV=size_BV)

    def _groups(self, tokens: TokenView, num_keep_B: Tensor) -> tuple[Tensor, Tensor]:
        """The token that each one's group goes by, and the order in which tokens merge away, (B, V)."""
        x_BVD, valid_BV = tokens.vision_BVD.detach().float(), tokens.valid_BV
        if self.metric == "tower":
            assert tokens.tower_features_BLVD is not None
            x_BVD = tokens.tower_features_BLVD[:, 0].detach().float()
        column_BV = torch.arange(valid_BV.shape[1], device=valid_BV.device).expand_as(valid_BV)
        group_BV, step_BV, left_BV = column_BV, torch.zeros_like(column_BV), valid_BV
        count_B1 = on(num_keep_B, x_BVD)[:, None].minimum(valid_BV.sum(1, keepdim=True))
        for side in self._sides(tokens.canvas):
            mean_BVD, _ = frame_mean(x_BVD, group_BV, valid_BV)  # of each group, at the token that it goes by
            window_BV = place_inside(column_BV, window_of(tokens, side), left_BV)[1].masked_fill(~left_BV, 0)
            similar_BV, middle_BV, near_BV = self._compare(mean_BVD, window_BV, left_BV, tokens)
            goes_BV = left_BV & (middle_BV != column_BV)
            if self.threshold is not None:
                goes_BV &= similar_BV >= self.threshold
            gone_B1 = left_BV.sum(1, keepdim=True) - count_B1
            # Most similar windows first, in each the tokens most like its middle.
            order_BV = places(-near_BV, column_BV)
            order_BV = places(-similar_BV, places(window_BV, order_BV))
            place_BV = places((~goes_BV).long(), order_BV)
            if self.threshold is None:
                goes_BV &= place_BV < gone_B1
            to_BV = torch.where(goes_BV, middle_BV, column_BV)
            before_B1 = (valid_BV & ~left_BV).sum(1, keepdim=True)
            step_BV = torch.where(goes_BV, before_B1 + place_BV + 1, step_BV)
            group_BV, left_BV = to_BV.gather(1, group_BV), left_BV & ~goes_BV
        return group_BV, step_BV

    def _sides(self, canvas: tuple[int, int]) -> list[int]:
        """Sides of the windows, one round after the other; 0 for the whole row."""
        sides = [self.side]
        while self.threshold is None and sides[-1] < max(canvas):
            sides.append(2 * sides[-1])
        return sides if self.threshold is not None else [*sides, 0]

    def _compare(
        self, x_BVD: Tensor, window_BV: Tensor, left_BV: Tensor, tokens: TokenView
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For each token left: similarity and middle token of its window, and its own cosine to that."""
        unit_BVD = F.normalize(x_BVD, dim=-1).masked_fill(~left_BV[..., None], 0.0)
        mean_BTD, size_BT = frame_mean(unit_BVD, window_BV, left_BV)
        own_BT, _ = frame_mean(unit_BVD.square().sum(-1, keepdim=True), window_BV, left_BV)
        # Sum over pairs = square of the sum - sum of squares.
        pairs_BT = (size_BT * mean_BTD.square().sum(-1) - own_BT[..., 0]) / (size_BT - 1).clamp(min=1)
        pairs_BT = pairs_BT.masked_fill(pairs_BT > 1 - SAME, 1.0)
        is_middle_BV = central(window_BV, tokens.row_BV, tokens.col_BV, left_BV)
        column_BV = torch.arange(left_BV.shape[1], device=left_BV.device).expand_as(window_BV)
        trash_BV = window_BV.masked_fill(~is_middle_BV, left_BV.shape[1])
        middle_BT = torch.zeros(len(left_BV), left_BV.shape[1] + 1, dtype=torch.long, device=left_BV.device)
        middle_BV = middle_BT.scatter(1, trash_BV, column_BV).gather(1, window_BV)
        near_BV = (unit_BVD * take(unit_BVD, middle_BV)).sum(-1)
        near_BV = near_BV.masked_fill(near_BV > 1 - SAME, 1.0)
        return pairs_BT.gather(1, window_BV), middle_BV, near_BV


def window_of(tokens: TokenView, side: int) -> Tensor:
    """Number (B, V) of each token's window of side x side tokens; no window holds tokens of two tiles.

    Args:
        tokens: rows and columns of a tile are counted from its first one.
        side: of a window; 0 puts all tokens of a row into one.
    """
    if not side:
        return torch.zeros_like(tokens.tile_BV)
    column_BV = torch.arange(tokens.tile_BV.shape[1], device=tokens.tile_BV.device).expand_as(tokens.tile_BV)
    tile_BV = place_inside(column_BV, tokens.tile_BV, tokens.valid_BV)[1]
    places_BV = []
    for place_BV in (tokens.row_BV, tokens.col_BV):
        low_BV = torch.zeros_like(tile_BV).scatter_reduce(1, tile_BV, place_BV, "amin", include_self=False)
        places_BV.append((place_BV - low_BV.gather(1, tile_BV)) // side)
    rows, cols = (size // side + 1 for size in tokens.canvas)
    return (tile_BV * rows + places_BV[0]) * cols + places_BV[1]
