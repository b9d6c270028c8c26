"""HoloV: share the budget out to crops by attention and diversity, retain by attention (arXiv 2510.02912, section 4).

B rows, V tokens, P crops, M tokens of the largest crop, C width of the tower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk, on, rank, slots, take
from tpcompress.pruners.tower_attention import SOURCES, check_source, in_tiers, saliency

EPSILON = 1e-6
"""Added to divisors in the official code."""


class HoloV(Pruner):
    """A crop is one of P runs of the sequence; its share of T is as mean_v(alpha a_v + beta s var_u cos(h_v, h_u)).

    a is the attention, var_u goes over the other tokens of the crop (sum of squares / their number), and s = mean of
    alpha a / mean of var over the row brings both to one magnitude. Shares are floors, and what they leave goes one by
    one to the crops of highest score (`allot`); inside a crop attention alone decides.

    needs  tower_features, and tower_cls or tower_received (`attention`).
    gives  keep_BV, scores_BV = (kept, attention).
    Paper: 16 crops, alpha 1e3, beta 0.09 on LLaVA-1.5; layer -2. Cost: V x M cosines, P rounds over B x P numbers.
    Unlike the official code (obananas/HoloV, LLaVA): s is computed over the whole row, which the paper leaves open;
    the official s is computed per run, so the variance cancels from a run's mean up to an epsilon of 1e-6, and the
    official shares are those of `beta: 0`. The official variance counts each token's own similarity as 0, and a run of
    one token is scored by its attention without alpha. Runs here hold ceil or floor of V / P tokens, spread evenly;
    officially the first V mod P runs are one longer. A crop whose share exceeds its size passes the rest on to the
    others until the budget is spent; the official code fills these places with zero vectors. Retained tokens are in
    ascending order (officially by attention inside a crop).
    `compat` selects the tokens of the official code: its runs, scores and shares, and fewer than T tokens where a
    share exceeds a crop.
    """

    name = "holov"
    paper = "2510.02912"
    group = "attention in the vision tower"
    paper_plan = """
    # HoloV: 64 of LLaVA-1.5's 576 tokens, shared out to 16 crops; renumbered.
    stages:
      - {pruner: holov, keep_tokens: 64}
    positions: compact
    """
    test_arguments = ({"attention": "received", "crops": 5, "beta": 3.0},)
    inexact_arguments = ({"compat": True},)

    def __init__(
        self,
        crops: int = 16,
        alpha: float = 1e3,
        beta: float = 0.09,
        attention: str = "class",
        compat: bool = False,
    ) -> None:
        super().__init__()
        check_source(self.name, attention)
        if crops < 1 or alpha < 0 or beta < 0:
            raise ValueError(
                f"holov needs crops >= 1, alpha and beta >= 0, got {crops}, {alpha}, {beta}; correct them."
            )
        self.crops, self.alpha, self.beta, self.attention, self.compat = crops, alpha, beta, attention, compat
        self.exact_count = not compat

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tower_features", SOURCES[self.attention]})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert tokens.tower_features_BLVD is not None
        attention_BV, (B, V) = saliency(tokens, self.attention), tokens.valid_BV.shape
        features_BVC = tokens.tower_features_BLVD[:, 0]
        index_BPM, real_BPM = runs(tokens.valid_BV, self.crops, first_longer=self.compat)
        score = official_crop_scores if self.compat else crop_scores
        score_BP = score(features_BVC, attention_BV, index_BPM, real_BPM, self.alpha, self.beta)
        size_BP, budget_B = real_BPM.sum(-1), on(num_keep_B, score_BP)
        if self.compat:
            quota_BP = official_quota(score_BP, size_BP, budget_B)
        else:
            quota_BP = allot(score_BP, size_BP, budget_B, self.crops)
        attention_BPM = attention_BV.gather(1, index_BPM.flatten(1)).view(index_BPM.shape)
        keep_BPM = keep_topk(attention_BPM.flatten(0, 1), real_BPM.flatten(0, 1), quota_BP.flatten()).view_as(real_BPM)
        # One place more than there are tokens takes what no crop holds.
        place_BV = index_BPM.masked_fill(~real_BPM, V).flatten(1)
        wide_BW = torch.zeros(B, V + 1, dtype=torch.bool, device=place_BV.device)
        keep_BV = wide_BW.scatter(1, place_BV, keep_BPM.flatten(1))[:, :V]
        return Selection(keep_BV, in_tiers(keep_BV.long(), attention_BV))


def runs(valid_BV: Tensor, crops: int, first_longer: bool = False) -> tuple[Tensor, Tensor]:
    """Cut the n valid tokens of each row into runs: the o-th falls into run floor(o P / n).

    Args:
        valid_BV: bool (B, V).
        crops: number of runs P.
        first_longer: the first n mod P runs hold one token more than the others, as in the official code.

    Returns:
        token (B, P, M) and whether there is one, M = ceil(V / P); runs of fewer tokens than P have are empty.
    """
    V = valid_BV.shape[1]
    order_BV, _ = slots(valid_BV, V)
    count_B1 = valid_BV.sum(1, keepdim=True)
    bound_P = torch.arange(crops + 1, device=valid_BV.device)
    if first_longer:
        start_BP = bound_P * (count_B1 // crops) + bound_P.minimum(count_B1 % crops)
    else:
        start_BP = -(-bound_P * count_B1 // crops)
    place_BPM = start_BP[:, :-1, None] + torch.arange(-(-V // crops), device=valid_BV.device)
    real_BPM = place_BPM < start_BP[:, 1:, None]
    return order_BV.gather(1, place_BPM.clamp(max=V - 1).flatten(1)).view(place_BPM.shape), real_BPM


def crop_scores(
    features_BVC: Tensor, attention_BV: Tensor, index_BPM: Tensor, real_BPM: Tensor, alpha: float, beta: float
) -> Tensor:
    """Mean over each crop of alpha a + beta s var(cos), fp64 (B, P) >= 0; 0 for an empty crop.

    Args:
        features_BVC: features of the tower.
        attention_BV: fp32 (B, V).
        index_BPM: the tokens of each crop.
        real_BPM: False where a crop has fewer.
        alpha: weight of the attention.
        beta: weight of the variance, which s brings to the magnitude of alpha a.
    """
    B, P, M = index_BPM.shape
    cosine_BPMM, pair_BPMM = _crop_cosines(features_BVC, index_BPM, real_BPM)
    others_BPM1 = pair_BPMM.sum(-1, keepdim=True).clamp(min=1)
    mean_BPM1 = cosine_BPMM.masked_fill(~pair_BPMM, 0.0).sum(-1, keepdim=True) / others_BPM1
    apart_BPMM = (cosine_BPMM - mean_BPM1).masked_fill(~pair_BPMM, 0.0)
    var_BPM = (apart_BPMM.square().sum(-1, keepdim=True) / others_BPM1).squeeze(-1)
    attention_BPM = attention_BV.double().gather(1, index_BPM.flatten(1)).view(B, P, M)
    salient_BPM = alpha * attention_BPM.masked_fill(~real_BPM, 0.0)
    # Below the floor the variance is that of rounding, and must not be blown up to the size of the attention.
    floor = 1e-10 * real_BPM.sum((1, 2))
    scale_B = salient_BPM.sum((1, 2)) / var_BPM.sum((1, 2)).maximum(floor).clamp(min=1e-10)
    token_BPM = salient_BPM + beta * scale_B[:, None, None] * var_BPM
    return token_BPM.sum(-1) / real_BPM.sum(-1).clamp(min=1)


def official_crop_scores(
    features_BVC: Tensor, attention_BV: Tensor, index_BPM: Tensor, real_BPM: Tensor, alpha: float, beta: float
) -> Tensor:
    """Scores of the official code, fp64 (B, P): the variance is scaled within each run; arguments as `crop_scores`.

    The row of similarities of a token holds 0 in its own place, which counts in the sum of squares; sums are divided
    by the number of other tokens. A run of one token is scored by its attention, without alpha.
    """
    B, P, M = index_BPM.shape
    cosine_BPMM, pair_BPMM = _crop_cosines(features_BVC, index_BPM, real_BPM)
    size_BP = real_BPM.sum(-1)
    others_BP11 = (size_BP - 1).clamp(min=1)[..., None, None]
    similar_BPMM = cosine_BPMM.masked_fill(~pair_BPMM, 0.0)
    both_BPMM = real_BPM[..., None] & real_BPM[..., None, :]
    apart_BPMM = (similar_BPMM - similar_BPMM.sum(-1, keepdim=True) / others_BP11).masked_fill(~both_BPMM, 0.0)
    var_BPM = (apart_BPMM.square() / others_BP11).sum(-1)
    attention_BPM = attention_BV.double().gather(1, index_BPM.flatten(1)).view(B, P, M).masked_fill(~real_BPM, 0.0)
    mean_BP = attention_BPM.sum(-1) / size_BP.clamp(min=1)
    var_BP = var_BPM.sum(-1) / size_BP.clamp(min=1)
    scaled_BP = alpha * mean_BP
    return torch.where(size_BP > 1, scaled_BP + beta * scaled_BP * var_BP / (var_BP + EPSILON), mean_BP)


def official_quota(score_BP: Tensor, size_BP: Tensor, count_B: Tensor) -> Tensor:
    """Shares of the official code, int64 (B, P): floors, one more to the best crops, cut to what a crop holds."""
    share_BP = (count_B[:, None] * (score_BP / (score_BP.sum(1, keepdim=True) + EPSILON))).floor().long()
    left_B1 = count_B[:, None] - share_BP.sum(1, keepdim=True)
    return (share_BP + (rank(score_BP, size_BP > 0) < left_B1).long()).minimum(size_BP)


def _crop_cosines(features_BVC: Tensor, index_BPM: Tensor, real_BPM: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines inside each crop, fp64 (B, P, M, M), and which of them compare two different real tokens."""
    B, P, M = index_BPM.shape
    # fp64 throughout: the floor of a share must not depend on how long other rows are.
    unit_BVC = F.normalize(features_BVC.double(), dim=-1)
    unit_BPMC = take(unit_BVC, index_BPM.flatten(1)).view(B, P, M, -1)
    pair_BPMM = real_BPM[..., None] & real_BPM[..., None, :] & ~torch.eye(M, dtype=torch.bool, device=real_BPM.device)
    return unit_BPMC @ unit_BPMC.mT, pair_BPMM


def allot(score_BP: Tensor, size_BP: Tensor, count_B: Tensor, rounds: int) -> Tensor:
    """Share a budget out to crops in proportion to their scores, none getting more than it holds.

    A round gives every crop with room floor(left * score / sum of the scores of crops with room), and one more to the
    best of them until `left` is given; what a crop cannot hold is left for the next round. Each round fills a crop or
    leaves nothing, so as many rounds as there are crops give exactly min(count, sum of sizes).

    Args:
        score_BP: real numbers >= 0; where all with room are 0 they count as equal.
        size_BP: int64 (B, P), what each crop holds.
        count_B: int64 (B,) on the same device.
        rounds: at most this many; 1 loses what a crop cannot hold.

    Returns:
        int64 (B, P).
    """
    quota_BP = torch.zeros_like(size_BP)
    for _ in range(rounds):
        room_BP, left_B1 = quota_BP < size_BP, count_B[:, None] - quota_BP.sum(1, keepdim=True)
        open_BP = score_BP.masked_fill(~room_BP, 0.0)
        open_BP = torch.where((open_BP > 0).any(1, keepdim=True), open_BP, room_BP.to(score_BP.dtype))
        share_BP = (left_B1 * (open_BP / open_BP.sum(1, keepdim=True).clamp(min=1e-30))).floor().long()
        one_BP = room_BP & (rank(open_BP, room_BP) < left_B1 - share_BP.sum(1, keepdim=True))
        quota_BP = (quota_BP + share_BP + one_BP).minimum(size_BP)
    return quota_BP
