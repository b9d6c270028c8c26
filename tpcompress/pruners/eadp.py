"""EADP: cover the tokens that the question's most selective text tokens point at (arXiv 2607.02484)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.greedy import Coverage, cosines, first_picks, greedy, on_host, products, stretch

SPACES = ("text", "joint")
FEW = 20
"""Percentage of the text tokens from which the official code reads d."""


class EADP(Pruner):
    """Greedy argmax_u sum_j w_j max(0, s(u, j) - c_j), with c_j = max(0, max_{k in S} s(k, j)).

    s = (1 + cosine of the tokens) / 2; w = smooth(stretch(mu g + (1 - mu) d))^beta: demand is where the text tokens
    point.
    c_ij = cosine of text token i and token j, p_i = softmax_j(c_ij / tau), h_i = entropy of p_i: high for text tokens
    that point nowhere. d_j = sum_i a_i c_ij over the text tokens with h_i up to the q-quantile, a = softmax(-h /
    gamma); g_j = mean of c_ij over all text tokens; smooth = 3 x 3 Gaussian (sigma 1) over the grid of each tile,
    reflected at its edges.

    `relevance: text` reads text and vision tokens as they are at the stage. The paper reads both in CLIP's joint space
    (`joint`, which no checkpoint of a language model holds) with all cosines negated, and g from the token that ends
    the question there; `text` is its substitute, with positive cosines.
    `compat` scores as the official code for Qwen's embedding space does: all cosines are negated, g is the negated
    cosine to the mean text embedding, d is read from the max(1, floor(0.2 Q)) text tokens of lowest
    entropy, and the entropy is that of the negated cosines, -sum p log(p + 1e-12). `q` is not used then. That code sets
    beta to 2.

    needs  text.     gives  keep_BV, scores_BV = - order of the pick (unpicked tokens last).
    Paper: mu = q = 0.5, tau = gamma = 0.01, beta = 1, 64 of LLaVA-1.5's 576 tokens, before the language model.
    Cost: one V x V Gram matrix, then V x V work per pick at most, on a CPU a few rows of it (see `Coverage`).
    Unlike the official code, also with `compat`: tiles of an image are covered together (officially each gets a part
    of the budget in proportion to its demand, rounded down); any grid works (officially 24 x 24 on LLaVA), and a
    neighbour that an earlier stage dropped is replaced by the opposite one, then by the token itself. A prompt without
    text tokens weights all tokens equally. Without `compat` the cosines keep their sign, g is the mean of the cosines,
    and d reads the paper's quantile, floor(q (Q - 1)) + 1 of the Q text tokens. What the official code compares in the
    greedy picks, s, was not observed; it is the paper's here.
    """

    name = "eadp"
    paper = "2607.02484"
    group = "duplication and diversity"
    paper_plan = """
    # EADP: 64 of LLaVA-1.5's 576 tokens that cover what the words point at, before the language model. Words and
    # tokens are compared among the language model's own embeddings; the paper compares them in CLIP's joint space.
    stages:
      - {pruner: eadp, keep_tokens: 64}
    positions: compact
    """
    test_arguments = (
        {"mu": 0.0, "q": 0.3, "beta": 5.0},
        {"mu": 1.0, "q": 1.0, "beta": 0.0},
        {"compat": True, "beta": 2.0},
    )

    def __init__(
        self,
        mu: float = 0.5,
        q: float = 0.5,
        beta: float = 1.0,
        tau: float = 0.01,
        gamma: float = 0.01,
        relevance: str = "text",
        compat: bool = False,
    ) -> None:
        super().__init__()
        if not (0 <= mu <= 1 and 0 < q <= 1):
            raise ValueError(f"eadp needs mu in [0, 1] and q in (0, 1], got mu {mu} and q {q}.")
        if not (beta >= 0 and tau > 0 and gamma > 0):
            raise ValueError(f"eadp needs beta >= 0, tau > 0 and gamma > 0, got {beta}, {tau} and {gamma}.")
        if relevance not in SPACES:
            raise ValueError(f"eadp has no relevance '{relevance}'; choose one of {', '.join(SPACES)}.")
        self.mu, self.q, self.beta, self.tau, self.gamma, self.relevance = mu, q, beta, tau, gamma, relevance
        self.compat = compat

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.relevance})

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        if self.relevance == "joint":
            raise ValueError("eadp is shown no joint space of image and text; set relevance to text.")
        assert tokens.text_BSD is not None and tokens.text_valid_BS is not None
        valid_BV = tokens.valid_BV
        views = tokens.vision_BVD, valid_BV, tokens.text_BSD, tokens.text_valid_BS
        if self.compat:
            aim_BV = official_relevance(*views, self.mu, self.tau, self.gamma)
        else:
            aim_BV = instruction_relevance(*views, self.mu, self.q, self.tau, self.gamma)
        tile_BV = torch.stack([tokens.tile_BV, tokens.image_BV], -1)
        smooth_BV = smooth(stretch(aim_BV, valid_BV), valid_BV, tokens.row_BV, tokens.col_BV, tile_BV, tokens.canvas)
        similar_BVV = cosines(tokens.vision_BVD).add_(1).mul_(0.5)
        order_BV = demanded_cover(similar_BVV, smooth_BV**self.beta, valid_BV, int(num_keep_B.max()))
        return first_picks(order_BV, valid_BV, num_keep_B)


def instruction_relevance(
    vision_BVD: Tensor,
    valid_BV: Tensor,
    text_BSD: Tensor,
    text_valid_BS: Tensor,
    mu: float = 0.5,
    q: float = 0.5,
    tau: float = 0.01,
    gamma: float = 0.01,
) -> Tensor:
    """mu g + (1 - mu) d of `EADP`, before it is stretched.

    Args:
        vision_BVD: features of the vision tokens (B, V, D).
        valid_BV: bool (B, V).
        text_BSD: features of the sequence (B, S, D).
        text_valid_BS: its text tokens that are read.
        mu, q, tau, gamma: as in `EADP`.

    Returns:
        fp32 (B, V); 0 in a row without text tokens.
    """
    text_BSD, text_valid_BS = _words_only(text_BSD, text_valid_BS)
    near_BSV = F.normalize(text_BSD.float(), dim=-1) @ F.normalize(vision_BVD.float(), dim=-1).mT
    near_BSV = near_BSV.masked_fill(~text_valid_BS[..., None], 0.0)
    words_B1 = text_valid_BS.sum(1, keepdim=True)
    global_BV = near_BSV.sum(1) / words_B1.clamp(min=1)
    # In fp64: text tokens that point at one token differ in the tail of their entropy.
    log_BSV = (near_BSV.double() / tau).masked_fill(~valid_BV[:, None], -torch.inf).log_softmax(-1)
    entropy_BS = -(log_BSV.exp() * log_BSV.masked_fill(~valid_BV[:, None], 0.0)).sum(-1)
    # h <= quantile means h <= the value at its floor, since what it is interpolated towards lies above.
    place_B1 = ((words_B1 - 1).clamp(min=0) * q + 1e-4).long()
    limit_B1 = entropy_BS.masked_fill(~text_valid_BS, torch.inf).sort(1).values.gather(1, place_B1)
    aimed_BS = text_valid_BS & (entropy_BS <= limit_B1)
    weight_BS = (-entropy_BS / gamma).masked_fill(~aimed_BS, torch.finfo(torch.float32).min).softmax(1)
    dense_BV = (weight_BS[:, None].float() @ near_BSV)[:, 0]
    return mu * global_BV + (1 - mu) * dense_BV


def official_relevance(
    vision_BVD: Tensor,
    valid_BV: Tensor,
    text_BSD: Tensor,
    text_valid_BS: Tensor,
    mu: float = 0.5,
    tau: float = 0.01,
    gamma: float = 0.01,
) -> Tensor:
    """mu g + (1 - mu) d of the official code in the language model's embedding space; see `EADP` on `compat`.

    Args:
        vision_BVD, valid_BV, text_BSD, text_valid_BS, mu, tau, gamma: as in `instruction_relevance`.

    Returns:
        fp32 (B, V); 0 in a row without text tokens.
    """
    text_BSD, text_valid_BS = _words_only(text_BSD, text_valid_BS)
    unit_BVD, words_B1 = F.normalize(vision_BVD.float(), dim=-1), text_valid_BS.sum(1, keepdim=True)
    mean_BD = text_BSD.float().masked_fill(~text_valid_BS[..., None], 0.0).sum(1) / words_B1.clamp(min=1)
    global_BV = -products(unit_BVD, F.normalize(mean_BD, dim=-1))
    far_BSV = -(F.normalize(text_BSD.float(), dim=-1) @ unit_BVD.mT).masked_fill(~text_valid_BS[..., None], 0.0)
    share_BSV = (far_BSV.double() / tau).masked_fill(~valid_BV[:, None], -torch.inf).softmax(-1)
    entropy_BS = -(share_BSV * (share_BSV + 1e-12).log()).sum(-1)
    place_BS = entropy_BS.masked_fill(~text_valid_BS, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    read_BS = text_valid_BS & (place_BS < (words_B1 * FEW // 100).clamp(min=1))
    weight_BS = (-entropy_BS / gamma).masked_fill(~read_BS, torch.finfo(torch.float32).min).softmax(1)
    dense_BV = (weight_BS[:, None].float() @ far_BSV)[:, 0]
    return mu * global_BV + (1 - mu) * dense_BV


def _words_only(text_BSD: Tensor, text_valid_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that hold a text token in some row; on an accelerator all columns, which needs no host-device sync."""
    if not on_host(text_valid_BS):
        return text_BSD, text_valid_BS
    read_S = text_valid_BS.any(0)
    read_S[0] = True  # one column at least
    column_M = torch.from_numpy(read_S.numpy().nonzero()[0])
    return text_BSD.index_select(1, column_M), text_valid_BS.index_select(1, column_M)


def smooth(
    x_BV: Tensor, valid_BV: Tensor, row_BV: Tensor, col_BV: Tensor, tile_BVN: Tensor, canvas: tuple[int, int]
) -> Tensor:
    """3 x 3 Gaussian (sigma 1) over the grid, within each tile; reflected where there is no neighbour.

    Args:
        x_BV: real numbers (B, V).
        valid_BV: bool (B, V).
        row_BV, col_BV: place of each token, as in `TokenView`.
        tile_BVN: numbers (B, V, N) that neighbours share.
        canvas: (rows, columns) that hold every place.
    """
    rows, cols = canvas
    V = x_BV.shape[1]
    place_BV = torch.where(valid_BV, row_BV * cols + col_BV, rows * cols)
    token_V = torch.arange(V, device=x_BV.device)
    # One place more, where all padding goes and where every step off the canvas leads: no token is there.
    token_BP = torch.full((len(x_BV), rows * cols + 1), V, device=x_BV.device)
    token_BP = token_BP.scatter(1, place_BV, token_V.expand_as(place_BV))
    token_BP[:, -1] = V
    for across in (False, True):
        side = [_neighbour(token_BP, row_BV, col_BV, tile_BVN, canvas, step, across) for step in (-1, 1)]
        itself_BV = token_V.expand_as(place_BV)
        before_BV = torch.where(side[0] < V, side[0], torch.where(side[1] < V, side[1], itself_BV))
        after_BV = torch.where(side[1] < V, side[1], torch.where(side[0] < V, side[0], itself_BV))
        edge = math.exp(-0.5)
        x_BV = (x_BV + edge * (x_BV.gather(1, before_BV) + x_BV.gather(1, after_BV))) / (1 + 2 * edge)
    return x_BV


def _neighbour(
    token_BP: Tensor,
    row_BV: Tensor,
    col_BV: Tensor,
    tile_BVN: Tensor,
    canvas: tuple[int, int],
    step: int,
    across: bool,
) -> Tensor:
    """The token one step away in the same tile, int64 (B, V); V where there is none."""
    rows, cols = canvas
    V = row_BV.shape[1]
    row_BV, col_BV = (row_BV, col_BV + step) if across else (row_BV + step, col_BV)
    inside_BV = (row_BV >= 0) & (row_BV < rows) & (col_BV >= 0) & (col_BV < cols)
    token_BV = token_BP.gather(1, torch.where(inside_BV, row_BV * cols + col_BV, rows * cols))
    index_BVN = token_BV.clamp(max=V - 1)[..., None].expand_as(tile_BVN)
    kin_BV = (tile_BVN.gather(1, index_BVN) == tile_BVN).all(-1)
    return torch.where(kin_BV, token_BV, V)


def demanded_cover(similar_BVV: Tensor, demand_BV: Tensor, valid_BV: Tensor, num_picks: int) -> Tensor:
    """Order of the greedy picks by coverage gain, weighed by how much each covered token matters.

    Args:
        similar_BVV: symmetric similarity, fp32 (B, V, V).
        demand_BV: at least 0 (B, V).
        valid_BV: bool (B, V); padding neither covers nor counts as uncovered.
        num_picks: how many picks to make.

    Returns:
        int64 (B, V): 0 for the first pick, ...; V for tokens never picked. Ties: the earlier token.
    """
    return greedy(Coverage(similar_BVV, demand_BV.masked_fill(~valid_BV, 0.0)), valid_BV, num_picks)
