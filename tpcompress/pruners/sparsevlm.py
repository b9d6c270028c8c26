"""SparseVLM: retain the vision tokens that the text closest to the image attends to (arXiv 2410.04417, section 3).

B rows, V vision tokens, U vision tokens at the language model's input, Q text tokens of the prompt, H attention heads,
N recycled tokens, D hidden size.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from tpcompress.pruners.base import INSTRUCTION, Pruner, Selection, TokenView
from tpcompress.pruners.topk import head_mean, keep_topk, on, rank, slots, take

LAYERS = (3, 7, 16)
"""`layer` of the official stages: decoder layers 2, 6 and 15 have run."""

RANKED = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""By version and average budget: how many of LLaVA-1.5's 576 tokens each official stage retains by rank. Version 1.5
adds recycled tokens to these."""

Count = TypeVar("Count", int, Tensor)


class SparseVLM(Pruner):
    """score(v) = mean over raters t and heads of A[t, v] in the layer before the stage.

        p_t = mean_i softmax_t(x_i . e_t)     x_i vision tokens, e_t text tokens, both at the language model's input
        raters = {t: p_t > mean p}            among the text tokens after the image; among all where there are none

    With `recycle`, the best of the dropped tokens (30 % of them, plus one) are clustered (`density_peaks`) and each
    cluster's mean replaces its peak, at the peak's own place; a tenth of their number, plus one, such clusters. The
    ranked tokens give way, so that the budget holds: as many stay as leave room for the clusters of what they drop,
    and at least one.

    needs  attention_prompt, input (so `layer` >= 1).     gives  keep_BV, scores_BV; vision_BVD with `recycle`.
    Paper: `recycle`, stages at layers 3, 7 and 16 with the budgets of `sparsevlm_stages`; version 1.5 renumbers
    (`positions: compact`). Version 2 (no paper): no recycling, `heads: 14`, original positions. Cost: one row of
    attention per text token, U x Q products; with `recycle` N^2 distances in fp64, N = 0.3 V.
    Unlike the official code: any budget and batch; exact counts, which include recycled tokens; ties of density go
    to the earlier token (there random noise), and densities are compared before the exp, where far or near tokens do
    not all tie; recycled tokens stand in the order of positions (there after all ranked ones); a prompt whose text
    tokens are all equally close has all of them rate (there none). Version 2's division by an all-ones rotary attention
    map is left out: no view gives it. The strongest heads are those of the raters' own attention. The paper's adaptive
    number of tokens (rank of the attention matrix) is left out, as in the official code.

    Args:
        recycle: merge the best dropped tokens instead of losing them.
        heads: average only that many heads, those with most attention to the image; 0 = all.
        compat: with `recycle`, retain the official number: the budget counts ranked tokens and recycled ones are
            added on top. Changes nothing without.

    Raises:
        ValueError: fewer heads than 0.
    """

    name = "sparsevlm"
    paper = "2410.04417"
    group = "attention in the language model"
    paper_plan = """
    # SparseVLM 1.5 on LLaVA-1.5, 64 of 576 tokens on average: 66, 30 and 17 by rank, with the recycled ones 82, 32
    # and 18. On average 192: 309, 204, 113; 128: 312, 117, 39; 96: 249, 55, 27. Version 2: {type: sparsevlm, heads:
    # 14} and original positions at 192: 300, 200, 118; 128: 238, 108, 60; 96: 246, 54, 28; 64: 66, 34, 20.
    stages:
      - {pruner: {type: sparsevlm, recycle: true}, layer: 3, keep_tokens: 82}  # layers 0 to 2 see all
      - {pruner: {type: sparsevlm, recycle: true}, layer: 7, keep_tokens: 32}
      - {pruner: {type: sparsevlm, recycle: true}, layer: 16, keep_tokens: 18}
    positions: compact
    """
    test_arguments = (
        {"heads": 2},
        {"recycle": True},
        {"recycle": True, "heads": 3},
    )
    inexact_arguments = (
        {"recycle": True, "compat": True},
        {"recycle": True, "compat": True, "heads": 2},
    )

    def __init__(self, recycle: bool = False, heads: int = 0, compat: bool = False) -> None:
        super().__init__()
        if heads < 0:
            raise ValueError(f"sparsevlm averages its strongest `heads`, got {heads}; set 1 or more, or 0 for all.")
        self.recycle, self.heads, self.compat = recycle, heads, compat
        self.merges, self.exact_count = recycle, not (recycle and compat)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention_prompt", "input"})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        vision_BUD, valid_BU, word_BQD = tokens.input_vision_BUD, tokens.input_valid_BU, tokens.input_prompt_BQD
        attention_BHQV, role_BQ = tokens.attention_prompt_BHQV, tokens.prompt_role_BQ
        assert vision_BUD is not None and valid_BU is not None and word_BQD is not None
        assert attention_BHQV is not None and role_BQ is not None
        rater_BQ = text_raters(vision_BUD, valid_BU, word_BQD, question(role_BQ))
        scores_BV = rater_score(attention_BHQV, rater_BQ, tokens.valid_BV, self.heads)
        if not self.recycle:
            return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)
        total_B = tokens.valid_BV.sum(1)
        count_B = on(num_keep_B, scores_BV).minimum(total_B)
        dropped_B = total_B - count_B if self.compat else dropped_for(count_B, total_B, scores_BV.shape[1])
        ranked_B = total_B - dropped_B
        recycled_B, clusters_B = recycled(dropped_B)
        if not self.compat:
            clusters_B = count_B - ranked_B
        ranked_BV = keep_topk(scores_BV, tokens.valid_BV, ranked_B)
        recycled_BV = keep_topk(scores_BV, tokens.valid_BV & ~ranked_BV, recycled_B)
        peak_BV, vision_BVD = merge_clusters(tokens.vision_BVD, recycled_BV, clusters_B)
        return Selection(ranked_BV | peak_BV, scores_BV, vision_BVD=vision_BVD)


def sparsevlm_stages(tokens: int, version: str = "1.5", num_tokens: int = 576) -> list[tuple[int, int]]:
    """(`layer`, `keep_tokens`) of each stage for an average budget; those of version 1.5 count recycled tokens.

    The average is over 32 layers and counts 2, 6 and 15 as the stages' layers: 192 is 192.0 with the recycled tokens.

    Args:
        tokens: 192, 128, 96 or 64.
        version: "1.5" (recycles) or "2".
        num_tokens: what the first stage sees.

    Raises:
        ValueError: no such version or budget.
    """
    budgets = RANKED.get(version)
    if budgets is None or tokens not in budgets:
        known = "; ".join(f"version {v}: {', '.join(map(str, table))}" for v, table in RANKED.items())
        raise ValueError(f"SparseVLM has no stages for {tokens} tokens in version {version!r}; choose from {known}.")
    found, seen = [], num_tokens
    for layer, ranked in zip(LAYERS, budgets[tokens], strict=True):
        seen = ranked + (recycled(seen - ranked)[1] if version == "1.5" else 0)
        found.append((layer, seen))
    return found


def question(role_BQ: Tensor) -> Tensor:
    """bool (B, Q): the text tokens after the row's last vision token; all text tokens of a prompt without any there."""
    after_BQ = role_BQ == INSTRUCTION
    return torch.where(after_BQ.any(1, keepdim=True), after_BQ, role_BQ > 0)


def text_raters(vision_BUD: Tensor, valid_BU: Tensor, word_BQD: Tensor, span_BQ: Tensor) -> Tensor:
    """Text tokens that are closer to the image than the average text token, bool (B, Q); all of the span if none is.

    Args:
        vision_BUD: vision tokens at the language model's input.
        valid_BU: False where a shorter row was padded.
        word_BQD: text tokens at the language model's input.
        span_BQ: which of them may rate.
    """
    logits_BUQ = vision_BUD.float() @ word_BQD.float().mT
    # A finite floor: a row without any text token must not become NaN.
    share_BUQ = logits_BUQ.masked_fill(~span_BQ[:, None], torch.finfo(torch.float32).min).softmax(-1)
    share_BQ = share_BUQ.masked_fill(~valid_BU[..., None], 0.0).sum(1) / valid_BU.sum(1, keepdim=True).clamp(min=1)
    share_BQ = share_BQ.masked_fill(~span_BQ, 0.0)
    mean_B1 = share_BQ.sum(1, keepdim=True) / span_BQ.sum(1, keepdim=True).clamp(min=1)
    # The margin excludes rounding: two equal text tokens can differ by it.
    rater_BQ = (share_BQ > mean_B1 * (1 + 1e-5)) & span_BQ
    return torch.where(rater_BQ.any(1, keepdim=True), rater_BQ, span_BQ)


def rater_score(attention_BHQV: Tensor, rater_BQ: Tensor, valid_BV: Tensor, heads: int = 0) -> Tensor:
    """Mean attention of the raters to each vision token, fp32 (B, V).

    Args:
        attention_BHQV: attention of each text token to each vision token.
        rater_BQ: the text tokens that count.
        valid_BV: False where a shorter row was padded.
        heads: how many heads count, those whose raters attend to the vision tokens most; 0 = all.
    """
    # In fp64 the order of a sum, which padding changes, decides between no two tokens and no two heads.
    sum_BHV = attention_BHQV.masked_fill(~rater_BQ[:, None, :, None], 0.0).sum(2, dtype=torch.float64)
    mean_BHV = sum_BHV / rater_BQ.sum(1).clamp(min=1)[:, None, None]
    H = mean_BHV.shape[1]
    if not 0 < heads < H:
        return head_mean(mean_BHV)
    mass_BH = mean_BHV.masked_fill(~valid_BV[:, None], 0.0).sum(-1)
    strong_BH = rank(mass_BH, torch.ones_like(mass_BH, dtype=torch.bool)) < heads
    return (mean_BHV.masked_fill(~strong_BH[..., None], 0.0).sum(1) / heads).float()


def recycled(num_dropped: Count) -> tuple[Count, Count]:
    """How many of so many dropped tokens are recycled, and into how many clusters: 0.3 n + 1, a tenth of it + 1."""
    some = num_dropped > 0
    num = (num_dropped * 3 // 10 + 1) * some
    return num, (num // 10 + 1) * some


def dropped_for(count_B: Tensor, total_B: Tensor, V: int) -> Tensor:
    """How many tokens do not stay by rank, so that the clusters made of them fill the budget (B,).

    The fewest n with n - clusters(n) = total - count, and never all of them.
    """
    gone_V = torch.arange(V + 1, device=count_B.device)
    gone_V = gone_V - recycled(gone_V)[1]
    # It never falls as n grows, and rises by one at most: counting what is too small finds the place.
    least_B = (gone_V < (total_B - count_B)[:, None]).sum(1)
    return least_B.minimum(total_B - 1).clamp(min=0)


def merge_clusters(vision_BVD: Tensor, recycled_BV: Tensor, clusters_B: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster the recycled tokens and write each cluster's mean to its peak.

    Args:
        vision_BVD: hidden states of the vision tokens.
        recycled_BV: those that are merged; at most `recycled(V)` of each row.
        clusters_B: how many clusters, at most as many as tokens and as `recycled(V)` makes.

    Returns:
        The peaks, bool (B, V), and the hidden states, changed at the peaks only.
    """
    B, V, D = vision_BVD.shape
    N, most = recycled(V)
    index_BN, valid_BN = slots(recycled_BV, N)
    own_BND = take(vision_BVD, index_BN)
    x_BND = own_BND.float().masked_fill(~valid_BN[..., None], 0.0)
    order_BN, centre_BN = density_peaks(x_BND.detach(), valid_BN, clusters_B, most)
    peak_BN = (order_BN < clusters_B[:, None]) & valid_BN
    member_BNN = (centre_BN[:, None] == torch.arange(N, device=index_BN.device)[:, None]) & valid_BN[:, None]
    mean_BND = (member_BNN / member_BNN.sum(-1, keepdim=True).clamp(min=1)) @ x_BND
    value_BND = torch.where(peak_BN[..., None], mean_BND.to(vision_BVD.dtype), own_BND)
    peak_BV = torch.zeros_like(recycled_BV).scatter(1, index_BN, peak_BN)
    return peak_BV, vision_BVD.scatter(1, index_BN[..., None].expand(-1, -1, D), value_BND)


@torch.no_grad()
def density_peaks(x_BND: Tensor, valid_BN: Tensor, num_B: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """DPC-kNN: cluster tokens around those that are dense and far from anything denser.

        d_ij = |x_i - x_j| / sqrt(D);     rho_i = exp(-mean of d_ij^2 over the k nearest j, i among them)
        delta_i = least d_ij to a denser j; infinite for the densest, which is the first peak
        peaks = the `num` largest rho delta; any other token joins the nearest peak

    with k = `num`. Ties go to the earlier token; tokens closer than 1e-6 of their length are equal.

    Args:
        x_BND: features.
        valid_BN: False where a shorter row was padded.
        num_B: int64, peaks of each row, on the same device.
        most: no fewer than any row's peaks; known on the host.

    Returns:
        int64 (B, N): each token's place in the order of rho delta, and the index of the peak whose cluster it is in.
    """
    N, D = x_BND.shape[1:]
    # |a|^2 + |b|^2 - 2 ab, in fp64 and with a floor: its rounding must not separate equal tokens.
    x_BND = x_BND.double()
    size_BN = x_BND.square().sum(-1)
    sizes_BNN = size_BN[:, :, None] + size_BN[:, None]
    far_BNN = torch.baddbmm(sizes_BNN, x_BND, x_BND.mT, alpha=-2)
    far_BNN = far_BNN.masked_fill(far_BNN < 1e-12 * sizes_BNN, 0.0) / D  # d^2
    far_BNN = far_BNN.masked_fill(~(valid_BN[:, :, None] & valid_BN[:, None]), torch.inf)
    near_BNK = far_BNN.topk(min(most, N), largest=False).values.cumsum(-1)
    k_B = num_B.minimum(valid_BN.sum(1)).clamp(min=1)
    # -log rho: an exp would make all tokens tie that are far from each other, or close.
    sparse_BN = near_BNK.gather(-1, (k_B - 1)[:, None, None].expand(-1, N, 1))[..., 0] / k_B[:, None]
    place_BN = rank(-sparse_BN, valid_BN)
    denser_BNN = place_BN[:, None] < place_BN[..., None]
    delta_BN = far_BNN.masked_fill(~denser_BNN, torch.inf).amin(-1).sqrt()
    order_BN = rank(delta_BN.log() - sparse_BN, valid_BN)
    peak_BN = (order_BN < num_B[:, None]) & valid_BN
    nearest_BN = far_BNN.masked_fill(~peak_BN[:, None], torch.inf).argmin(-1)
    return order_BN, torch.where(peak_BN, torch.arange(N, device=x_BND.device), nearest_BN)
