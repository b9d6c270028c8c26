"""FlashVID: salient tokens that differ, and the rest merged over time and space (arXiv 2602.08024)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import place_inside, places
from tpcompress.pruners.frames import frame_mean
from tpcompress.pruners.greedy import Criterion, cosines, greedy, row_of
from tpcompress.pruners.merging import group_sizes, merge_groups
from tpcompress.pruners.topk import SAME, on, rank
from tpcompress.pruners.tower_attention import SOURCES, check_share, check_source, saliency


class FlashVID(Pruner):
    """Of a budget of k, ceil(alpha k) tokens stay as they are, the other places hold means of all others.

    segments  The video is cut after frame t where cos(m_t, m_t+1) < `segment`, m the mean token of a frame, and at the
              least similar of the other frames until there are `min_segments`.
    distinct  Per frame farthest points, (1 - cos(x_i, x_j)) a_j the distance of a candidate j to a pick i, a its
              attention; first the one farthest from its nearest other token. Equally many of each frame, the earlier
              ones take the rest.
    over time A token that is left joins the one most similar to it in the frame before, of the same segment and left,
              too, if their cosine is above `threshold`, the most similar pairs first, and never so many that fewer
              tokens than the budget stay. So trees grow, and a tree goes by its earliest token, its root.
    in space  Among the means of a frame's trees, density-peak clustering: density exp(-mean squared distance to the c
              nearest, itself among them), c = min(clusters, 7); a centre has much density far from all that is denser;
              the others join the nearest centre. Frames have clusters in proportion to their trees.

    Each place is the mean of all its tokens, at the place of its centre's root. With `size` later layers weigh it by
    their number. An image is one frame, or several, its tiles: nothing merges over time, the rest is the same.

    needs  tower_received, or tower_cls with attention class, nothing with none.
    gives  keep_BV, scores_BV = - place (distinct, centres, rest), vision_BVD, size_BV with size.
    Paper: alpha 0.7, thresholds 0.8 and 0.9, 8 segments (4 for Qwen2.5-VL); 1.25 times the share before the language
    model, of which 30 % stay from layer 20 of 28 on, by the attention of the last token (the plan's second stage).
    Cost: two V x V Gram matrices, one pass over the features' distances per distinct pick, sorts of V.
    Unlike the official code: exact counts (there rounded up per frame); budget and links are shared out over the row,
    there per segment; means are those of all tokens, there wrong in trees of more than two levels and blind to sizes
    in space; a segment of one frame has no token twice; ties go to the earlier token instead of random noise. The
    wrapper's second version of the distance, times relevance to the segment, is not there: it can pick a token twice.
    """

    name = "flashvid"
    paper = "2602.08024"
    group = "video"
    merges = True
    paper_plan = """
    # FlashVID at 10 % of a video on Qwen2.5-VL-7B: 12.5 % before the language model, of which 30 % stay from layer 20
    # of 28 on.
    stages:
      - {pruner: {type: flashvid, min_segments: 4}, layer: 0, keep_ratio: 0.125}
      - {pruner: fastv, layer: 20, keep_ratio: 0.0375}
    """
    test_arguments = (
        {"attention": "none", "size": True},
        {"attention": "class", "alpha": 0.0, "threshold": -1.0},
        {"alpha": 1.0},
    )

    def __init__(
        self,
        alpha: float = 0.7,
        threshold: float = 0.8,
        segment: float = 0.9,
        min_segments: int = 8,
        attention: str = "received",
        size: bool = False,
    ) -> None:
        super().__init__()
        check_share(self.name, "alpha", alpha)
        if attention != "none":
            check_source(self.name, attention)
        if min_segments < 1:
            raise ValueError(f"flashvid has at least one segment, got min_segments = {min_segments}.")
        for argument, value in (("threshold", threshold), ("segment", segment)):
            if not -1 <= value <= 1:
                raise ValueError(f"flashvid needs a {argument} that is a cosine between -1 and 1, got {value}.")
        self.alpha, self.threshold, self.segment, self.min_segments = alpha, threshold, segment, min_segments
        self.attention, self.size = attention, size
        self.uses_token_sizes = size

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({SOURCES[self.attention]} if self.attention in SOURCES else ())

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        with torch.no_grad():
            keep_BV, group_BV, place_BV = self._groups(tokens, num_keep_B)
        vision_BVD = merge_groups(tokens.vision_BVD, group_BV, keep_BV, int(num_keep_B.max()))
        size_BV = group_sizes(group_BV).clamp(min=1).float() if self.size else None
        return Selection(keep_BV, -place_BV.float(), vision_BVD=vision_BVD, size_BV=size_BV)

    def _groups(self, tokens: TokenView, num_keep_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Retained tokens, the token that each one's group goes by, and the order of all tokens, (B, V)."""
        x_BVD, valid_BV = tokens.vision_BVD.detach().float(), tokens.valid_BV
        column_BV = torch.arange(valid_BV.shape[1], device=valid_BV.device).expand_as(valid_BV)
        frame_BV = place_inside(column_BV, tokens.tile_BV, valid_BV)[1]
        segment_BV = segments(x_BVD, frame_BV, valid_BV, self.segment, self.min_segments)
        similar_BVV = cosines(x_BVD)
        weight_BV = torch.ones_like(x_BVD[..., 0]) if self.attention == "none" else saliency(tokens, self.attention)
        own = [max(math.ceil(k * self.alpha - 1e-9), 0) for k in num_keep_B.numpy().tolist()]
        count_B1 = on(num_keep_B, x_BVD)[:, None].minimum(valid_BV.sum(1, keepdim=True))
        own_B1 = on(torch.tensor(own), x_BVD)[:, None].minimum(count_B1)
        order_BV = greedy(_Distinct(similar_BVV, weight_BV, frame_BV, valid_BV), valid_BV, max(own))
        own_BV = (order_BV < own_B1) & valid_BV
        left_BV = valid_BV & ~own_BV
        links_B1 = valid_BV.sum(1, keepdim=True) - count_B1
        moving_BV = left_BV if tokens.video_BV is None else left_BV & tokens.video_BV
        root_BV = trees(similar_BVV, frame_BV, segment_BV, moving_BV, self.threshold, links_B1)
        roots_BV = left_BV & (root_BV == column_BV)
        mean_BVD, _ = frame_mean(x_BVD, root_BV, valid_BV)  # the tokens of a tree instead of a frame
        centre_BV, joins_BV = density_peaks(mean_BVD, frame_BV, roots_BV, count_B1 - own_B1)
        group_BV = torch.where(left_BV, joins_BV.gather(1, root_BV), column_BV)
        tier_BV = 2 - 2 * own_BV.long() - centre_BV.long() + 2 * (~valid_BV).long()
        return own_BV | centre_BV, group_BV, places(tier_BV, places(order_BV, rank(weight_BV, valid_BV)))


class _Distinct(Criterion):
    """Farthest points inside frames: the frame with the fewest picks next, in it the candidate farthest from them."""

    def __init__(self, similar_BVV: Tensor, weight_BV: Tensor, frame_BV: Tensor, valid_BV: Tensor) -> None:
        self.similar_BVV, self.weight_BV, self.frame_BV = similar_BVV, weight_BV, frame_BV
        V = valid_BV.shape[1]
        itself_VV = torch.eye(V, dtype=torch.bool, device=valid_BV.device)
        apart_BVV = (frame_BV[:, None] != frame_BV[..., None]) | itself_VV | ~valid_BV[:, None]
        # A token that is alone in its frame is as far as can be.
        self.nearest_BV = 1 - similar_BVV.masked_fill(apart_BVV, -1.0).amax(-1)
        self.picks_BT = torch.zeros_like(frame_BV)
        self.started_BT = torch.zeros_like(valid_BV)

    def score(self, open_BV: Tensor) -> Tensor:
        turn_BV = self.picks_BT.gather(1, self.frame_BV) * open_BV.shape[1] + self.frame_BV
        next_B1 = turn_BV.masked_fill(~open_BV, torch.iinfo(torch.long).max).amin(1, keepdim=True)
        return (self.nearest_BV * self.weight_BV).masked_fill(turn_BV != next_B1, -torch.inf)

    def take(self, pick_B1: Tensor) -> None:
        frame_B1 = self.frame_BV.gather(1, pick_B1)
        inside_BV, fresh_B1 = self.frame_BV == frame_B1, ~self.started_BT.gather(1, frame_B1)
        apart_BV = 1 - row_of(self.similar_BVV, pick_B1)
        nearest_BV = torch.where(fresh_B1, apart_BV, self.nearest_BV.minimum(apart_BV))
        self.nearest_BV = torch.where(inside_BV, nearest_BV, self.nearest_BV)
        self.started_BT = self.started_BT.scatter(1, frame_B1, True)
        self.picks_BT = self.picks_BT.scatter_add(1, frame_B1, torch.ones_like(frame_B1))


def segments(x_BVD: Tensor, frame_BV: Tensor, valid_BV: Tensor, threshold: float, least: int) -> Tensor:
    """Number (B, V) of each token's segment: runs of frames whose mean tokens are alike.

    Args:
        x_BVD: features.
        frame_BV: number of each token's frame, from 0 without gaps.
        valid_BV: bool (B, V).
        threshold: a cut follows a frame whose cosine to the next one is below it.
        least: segments to have at least, if there are as many frames; further cuts are at the lowest cosines.
    """
    mean_BTD, size_BT = frame_mean(x_BVD, frame_BV, valid_BV)
    unit_BTD = F.normalize(mean_BTD, dim=-1)
    similar_BT = (unit_BTD * unit_BTD.roll(-1, 1)).sum(-1)
    follows_BT = (size_BT > 0) & (size_BT.roll(-1, 1) > 0)
    follows_BT[:, -1] = False
    cut_BT = follows_BT & ((similar_BT < threshold) | (rank(-similar_BT, follows_BT) < least - 1))
    return (cut_BT.long().cumsum(1) - cut_BT.long()).gather(1, frame_BV)


def trees(
    similar_BVV: Tensor, frame_BV: Tensor, segment_BV: Tensor, left_BV: Tensor, threshold: float, links_B1: Tensor
) -> Tensor:
    """The root (B, V) of each token: the end of its links to the most similar token of the frame before.

    Args:
        similar_BVV: cosine of all pairs, at most 1.
        frame_BV: number of each token's frame, from 0 without gaps.
        segment_BV: number of its segment; no link leaves one.
        left_BV: bool; the others neither link nor are linked to, and are their own roots.
        threshold: links are above it.
        links_B1: how many links a row may have; those of highest cosine come first, ties by the earlier token.
    """
    V = left_BV.shape[1]
    linked_BVV = (frame_BV[:, None] == frame_BV[..., None] - 1) & (segment_BV[:, None] == segment_BV[..., None])
    linked_BVV &= left_BV[:, None] & left_BV[..., None]
    best_BV, parent_BV = similar_BVV.masked_fill(~linked_BVV, -torch.inf).max(-1)
    may_BV = best_BV > threshold
    links_BV = may_BV & (rank(best_BV, may_BV) < links_B1)
    root_BV = torch.where(links_BV, parent_BV, torch.arange(V, device=left_BV.device))
    for _ in range(V.bit_length()):  # each step doubles how many links it follows
        root_BV = root_BV.gather(1, root_BV)
    return root_BV


def density_peaks(x_BVD: Tensor, frame_BV: Tensor, left_BV: Tensor, count_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster the tokens of each frame around density peaks, frames in proportion to their tokens.

    Args:
        x_BVD: features.
        frame_BV: number of each token's frame, from 0 without gaps.
        left_BV: bool; the tokens to cluster.
        count_B1: how many clusters a row has, at most as many as it has such tokens.

    Returns:
        bool (B, V), the centres; int64 (B, V), the centre that each such token joins, itself for all others. The
        clusters of frames are shared out by Webster's method, so that none has more than tokens. Of equal densities
        the earlier token counts as the denser one. A frame without a cluster joins the nearest centre of all.
    """
    V, D = x_BVD.shape[1:]
    column_V = torch.arange(V, device=x_BVD.device)
    together_BVV = (frame_BV[:, None] == frame_BV[..., None]) & left_BV[:, None] & left_BV[..., None]
    apart_BVV = distances(x_BVD) / D**0.5
    column_BV = column_V.expand_as(frame_BV)
    inside_BV = place_inside(column_BV, frame_BV, left_BV)[0]
    size_BV = together_BVV.sum(-1)
    key_BV = ((inside_BV + 0.5) / size_BV.clamp(min=1)).masked_fill(~left_BV, torch.inf)
    turn_BV = places(key_BV, column_BV)
    has_BV = (turn_BV < count_B1) & left_BV
    clusters_BV = (together_BVV & has_BV[:, None]).sum(-1)
    near_BVM = apart_BVV.masked_fill(~together_BVV, torch.inf).topk(min(7, V), largest=False).values
    nearest_BV1 = clusters_BV.clamp(1, 7).minimum(size_BV.clamp(min=1))[..., None]
    counts_BVM = torch.arange(near_BVM.shape[-1], device=x_BVD.device) < nearest_BV1
    density_BV = (-near_BVM.square().masked_fill(~counts_BVM, 0.0).sum(-1) / nearest_BV1[..., 0]).exp()
    place_BV = rank(density_BV, left_BV)
    denser_BVV = together_BVV & (place_BV[:, None] < place_BV[..., None])
    largest_BV = apart_BVV.masked_fill(~together_BVV, 0.0).amax(-1)
    delta_BV = torch.where(denser_BVV.any(-1), apart_BVV.masked_fill(~denser_BVV, torch.inf).amin(-1), largest_BV)
    # Where all is alike every product is 0, and the earlier token comes first.
    order_BV = place_inside(rank(density_BV * delta_BV, left_BV), frame_BV, left_BV)[0]
    centre_BV = left_BV & (order_BV < clusters_BV)
    to_BVV = apart_BVV.masked_fill(~centre_BV[:, None], torch.inf)
    own_BVV = to_BVV.masked_fill(~together_BVV, torch.inf)
    reach_BVV = torch.where((clusters_BV > 0)[..., None], own_BVV, to_BVV)
    joins_BV = torch.where(left_BV & ~centre_BV & centre_BV.any(1, keepdim=True), reach_BVV.argmin(-1), column_BV)
    return centre_BV, joins_BV


def distances(x_BVD: Tensor) -> Tensor:
    """Euclidean distance of all pairs of a row, fp32 (B, V, V); exactly 0 for duplicates."""
    squares_BV = x_BVD.square().sum(-1)
    sums_BVV = squares_BV[:, None] + squares_BV[..., None]
    squared_BVV = sums_BVV - 2 * (x_BVD @ x_BVD.mT)
    return squared_BVV.masked_fill(squared_BVV <= SAME * sums_BVV, 0.0).sqrt()
