"""Mean key: a token's query against the mean key of its row, which is self-attention's mean logit in linear time.

B rows, V vision tokens, D hidden size, K width.
"""

from __future__ import annotations

from torch import Tensor, nn

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.scorers.weighted import WeightedScorer, masked_mean, spread


class MeanKey(WeightedScorer):
    """score_v = q_v . mean_u k_u / sqrt(K),     q = W_q LN(x), k = W_k LN(x), the mean over valid tokens of the row.

    This is mean_u (q_v . k_u) / sqrt(K), the score of the paper, in O(V) instead of O(V^2): the mean may go inside.

    needs  nothing.     Source: VisionSelector (arXiv 2510.16598), K = D / 2.
    Cost: O(V D K).     Starts: random weights; equal tokens are ranked by `spread`.
    Unlike the official code: a norm before the projections, so that weights as small as 1e-4 are not needed; the mean
    is over the tokens of the row, where the official training takes it over all images of a packed batch, which its
    inference never sees; linear time.

    Args:
        width: K; null is half the hidden size.

    Raises:
        ValueError: the width is none.
    """

    name = "mean_key"
    test_arguments = ({"width": 3},)

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        if width is not None and width < 1:
            raise ValueError(f"mean_key needs width >= 1, got {width}; null is half the hidden size.")
        self.width = width

    def make(self, hidden_size: int) -> None:
        width = self.width or max(1, hidden_size // 2)
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.query = nn.Linear(hidden_size, width, bias=False)
        self.key = nn.Linear(hidden_size, width, bias=False)

    def rate(self, tokens: TokenView) -> Scores:
        x_BVD = self.norm(tokens.vision_BVD.to(self.dtype))
        scores_BV = mean_key_score(self.query(x_BVD), self.key(x_BVD), tokens.valid_BV)
        return Scores(scores_BV + spread(tokens.valid_BV))


def mean_key_score(query_BVK: Tensor, key_BVK: Tensor, valid_BV: Tensor) -> Tensor:
    """Mean scaled product (B, V) of each query with the keys of its row's valid tokens; 0 where there is none."""
    mean_B1K = masked_mean(key_BVK, valid_BV)
    return (query_BVK * mean_B1K).sum(-1) / query_BVK.shape[-1] ** 0.5
