"""CDPruner: retain the likeliest subset of a determinantal point process, given the question (arXiv 2506.10967)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.greedy import Criterion, cosines, first_picks, greedy, products, row_of, stretch
from tpcompress.pruners.tower_attention import SOURCES, saliency

RELEVANCE = ("text", "joint", *SOURCES, "none")
EXPLAINED = 1e-5
"""A token of which the picks leave no more than this share (of its squared length) counts as explained."""


class CDPruner(Pruner):
    """Greedy argmax of det(L_S), L = diag(r) K diag(r): K_ij = cos(x_i, x_j), r = relevance, stretched to (0, 1].

    Each pick is the token of largest r_i^2 e_i, where e_i is what the picks leave unexplained of its unit vector; the
    Cholesky factor of K_S grows by one row per pick. Once they explain all that is left (duplicates, more tokens than
    dimensions), the rest follows by relevance, then position.

    `relevance`: `text` = mean cosine of the token and the text tokens of the instruction, both as they are at the
    stage;
    `class` or `received` = attention in the vision tower; `none` = a plain determinantal point process.
    The paper's own is `joint`: minus the cosine of patch and question in CLIP's joint space, which no checkpoint of a
    language model holds. `text` is its substitute, with the sign as it stands: that CLIP's patches resemble what they
    do not show is a defect of its pooling.

    needs  text, tower_cls, tower_received, joint, or nothing, by relevance.
    gives  keep_BV, scores_BV = - order of the pick (unpicked tokens last).
    Paper: 64 of LLaVA-1.5's 576 tokens, before the language model.
    Cost: one V x V Gram matrix, then V work per pick and per earlier pick.
    Unlike the official code: r is stretched within each row, there over all tiles and images of a batch (so a choice
    depended on its neighbours); constant relevance makes r = 1, there NaN; a rank that is too low keeps the count,
    there the root of a negative number ended it. There is no `compat` for these: they depend on the batch. The budget
    of an image is spent over all its tiles; to spend it tile by tile, as there, wrap the pruner in `quota`.
    """

    name = "cdpruner"
    paper = "2506.10967"
    group = "duplication and diversity"
    paper_plan = """
    # CDPruner: 64 of LLaVA-1.5's 576 tokens, diverse and close to the question, before the language model. Closeness
    # is measured among the language model's own embeddings; the paper measures it in CLIP's joint space.
    stages:
      - {pruner: cdpruner, keep_tokens: 64}
    positions: compact
    """
    test_arguments = (
        {"relevance": "class"},
        {"relevance": "received"},
        {"relevance": "none"},
    )

    def __init__(self, relevance: str = "text") -> None:
        super().__init__()
        if relevance not in RELEVANCE:
            raise ValueError(f"cdpruner has no relevance '{relevance}'; choose one of {', '.join(RELEVANCE)}.")
        self.relevance = relevance

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(set() if self.relevance == "none" else {SOURCES.get(self.relevance, self.relevance)})

    @torch.no_grad()
    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        relevance_BV = stretch(self._relevance(tokens), tokens.valid_BV)
        order_BV = likeliest(cosines(tokens.vision_BVD), relevance_BV, tokens.valid_BV, int(num_keep_B.max()))
        return first_picks(order_BV, tokens.valid_BV, num_keep_B)

    def _relevance(self, tokens: TokenView) -> Tensor:
        if self.relevance == "none":
            return torch.ones_like(tokens.valid_BV, dtype=torch.float32)
        if self.relevance in SOURCES:
            return saliency(tokens, self.relevance)
        if self.relevance == "joint":
            raise ValueError("cdpruner is shown no joint space of image and text; set relevance to text, or to none.")
        assert tokens.text_BSD is not None and tokens.text_valid_BS is not None
        return mean_cosine(tokens.vision_BVD, tokens.text_BSD, tokens.text_valid_BS)


def mean_cosine(vision_BVD: Tensor, text_BSD: Tensor, text_valid_BS: Tensor) -> Tensor:
    """Mean cosine of each vision token and the valid text tokens, fp32 (B, V); 0 where there are no text tokens."""
    word_BSD = F.normalize(text_BSD.float(), dim=-1).masked_fill(~text_valid_BS[..., None], 0.0)
    mean_BD = word_BSD.sum(1) / text_valid_BS.sum(1, keepdim=True).clamp(min=1)
    return products(F.normalize(vision_BVD.float(), dim=-1), mean_BD)


def likeliest(similar_BVV: Tensor, relevance_BV: Tensor, valid_BV: Tensor, num_picks: int) -> Tensor:
    """Order of the greedy picks that maximise det(diag(r) K diag(r)) over the picks.

    Args:
        similar_BVV: K, fp32 (B, V, V), positive semidefinite with a diagonal of ones.
        relevance_BV: r in (0, 1].
        valid_BV: bool (B, V).
        num_picks: how many picks to make.

    Returns:
        int64 (B, V): 0 for the first pick, ...; V for tokens never picked. Ties: the earlier token. Tokens that the
        picks explain come after all others, by relevance, then position.
    """
    return greedy(_Volume(similar_BVV, relevance_BV, min(num_picks, valid_BV.shape[1])), valid_BV, num_picks)


class _Volume(Criterion):
    """By what factor a token would raise the determinant: r^2 times its unexplained share.

    The factor of L is diag(r) times that of K, so r stays out of the recursion and cannot blow up its divisions.
    """

    def __init__(self, similar_BVV: Tensor, relevance_BV: Tensor, num_picks: int) -> None:
        self.similar_BVV, self.relevance_BV, self.step = similar_BVV, relevance_BV, 0
        self.factor_BTV = similar_BVV.new_zeros(len(similar_BVV), num_picks, similar_BVV.shape[1])
        self.left_BV = torch.ones_like(relevance_BV)

    def score(self, open_BV: Tensor) -> Tensor:
        # Relevance less 2 is below any gain, and keeps the order of what is explained.
        gain_BV = self.relevance_BV.square() * self.left_BV
        return torch.where(self.left_BV > EXPLAINED, gain_BV, self.relevance_BV - 2)

    def take(self, pick_B1: Tensor) -> None:
        known_BV = torch.zeros_like(self.left_BV)
        if self.step:  # ONNX has no gather from nothing
            done_BTV = self.factor_BTV[:, : self.step]
            own_BT1 = done_BTV.gather(2, pick_B1[:, None].expand(-1, self.step, -1))
            # In fp64 and no product of matrices, so that neither padding nor the batch separates equal tokens.
            known_BV = (own_BT1 * done_BTV).sum(1, dtype=torch.float64).float()
        rest_BV = row_of(self.similar_BVV, pick_B1) - known_BV
        left_B1 = self.left_BV.gather(1, pick_B1)
        row_BV = torch.where(left_B1 > EXPLAINED, rest_BV * left_B1.clamp(min=EXPLAINED).rsqrt(), 0.0)
        self.factor_BTV[:, self.step] = row_BV
        self.left_BV = self.left_BV - row_BV.square()
        self.step += 1
