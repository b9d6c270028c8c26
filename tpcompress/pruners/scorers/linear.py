"""Linear: one direction of the hidden states gives a token its score.

B rows, V vision tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.scorers.weighted import WeightedScorer, spread


class Linear(WeightedScorer):
    """score_v = w . LN(x_v).

    The baseline of the other networks. Tokens are scored independently, so equal tokens are retained or dropped
    together. No bias and no weights in the norm: they would shift all scores equally, or duplicate w.

    needs  nothing.     Source: the router of mixture-of-depths (arXiv 2404.02258, section 3.2), with a norm before it.
    Cost: O(V D).     Starts: small random weights; equal tokens are ranked by `spread`.
    """

    name = "linear"

    def make(self, hidden_size: int) -> None:
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.direction = nn.Linear(hidden_size, 1, bias=False)
        with torch.no_grad():
            self.direction.weight.mul_(0.1)

    def rate(self, tokens: TokenView) -> Scores:
        x_BVD = self.norm(tokens.vision_BVD.to(self.dtype))
        return Scores(self.direction(x_BVD)[..., 0] + spread(tokens.valid_BV))
