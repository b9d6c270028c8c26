"""MLP: half of a token's channels stay its own, half become the mean of its row, and a small network scores them.

B rows, V vision tokens, D hidden size, C width.
"""

from __future__ import annotations

import torch
from torch import nn

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.scorers.weighted import WeightedScorer, masked_mean, spread


class MLP(WeightedScorer):
    """DynamicViT's predictor: each token is compared with the mean of the valid tokens of its row.

        h_v = gelu(W LN(x_v)) = [local_v, other_v], halves of C channels
        score_v = MLP([local_v, mean_u other_u]),     C -> C/2 -> C/4 -> 1 with GELU

    needs  nothing.     Source: DynamicViT (arXiv 2106.02034, section 3.2); Dynamic-LLaVA has it at width 512.
    Cost: O(V D C + V C^2).     Starts: random weights; equal tokens are ranked by `spread`.
    Unlike the official code: one score instead of two logits, whose difference it is; the mean is over valid tokens,
    since there is no decision of an earlier predictor (a stage before has already dropped its tokens); `width` is free
    where the paper has C = D.

    Args:
        width: C, a multiple of 4.

    Raises:
        ValueError: it is not.
    """

    name = "mlp"
    test_arguments = ({"width": 12},)

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"mlp needs a width that is a multiple of 4, got {width}; 64 is the default.")
        self.width = width

    def make(self, hidden_size: int) -> None:
        width = self.width
        self.enter = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU())
        self.leave = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 1, bias=False),
        )

    def rate(self, tokens: TokenView) -> Scores:
        local_BVC, other_BVC = self.enter(tokens.vision_BVD.to(self.dtype)).chunk(2, dim=-1)
        mean_BVC = masked_mean(other_BVC, tokens.valid_BV).expand_as(local_BVC)
        return Scores(self.leave(torch.cat([local_BVC, mean_BVC], -1))[..., 0] + spread(tokens.valid_BV))
