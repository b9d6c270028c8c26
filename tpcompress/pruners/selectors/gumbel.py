"""Gumbel gates: every token is kept or dropped by a coin of its own.

B rows, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpcompress.pruners.gate_components import Choice, Scores
from tpcompress.pruners.selectors.annealed import Annealed
from tpcompress.pruners.selectors.relaxations import straight_through
from tpcompress.pruners.topk import keep_topk, on


class Gumbel(Annealed):
    """l_v = e^a s_v + b + log(k / (n - k));   z_v = l_v + L_v, L logistic noise;   gate = [z > 0] + m - sg(m), m =
    sigmoid(z / T).

    The difference of two Gumbel variables is a logistic one, so this is the hard Gumbel softmax over {keep, drop}. a
    and b are learned (they start at 0): scores are standardised, and these are their scale and level, with which the
    expected count can follow a budget loss. Nothing else holds it to the budget. T falls from `temperature_start` to
    `temperature_end` in equal ratios.

    gives  keep_BV = top-k of s; exploring keep_BV = top-k of z, gate_BV, and expected_B = its sum. Full length spends
    all gates; a cut sequence has k tokens, of which more than expected may have gate 0.
    Source: DynamicViT (2106.02034), Dynamic-LLaVA: T from 1 to 0.1. Unlike them the level starts at the budget, gates
    of later stages are not multiplied by those of earlier ones, and inference keeps exactly k.
    Cost: one draw per token, one sort of V.
    """

    name = "gumbel"

    def __init__(self, temperature_start: float = 1.0, temperature_end: float = 0.1) -> None:
        super().__init__(temperature_start, temperature_end)
        self.affine: nn.Parameter | None = None

    @property
    def learned(self) -> bool:
        return True

    def build(self, hidden_size: int) -> None:
        if self.affine is None:
            self.affine = nn.Parameter(torch.zeros(2))

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        assert self.affine is not None, "gumbel has no weights yet: attach it to a model first"
        if not explore:
            return Choice(keep_topk(scores.scores_BV, valid_BV, num_keep_B), scores.scores_BV)
        log_scale, level = self.affine.unbind()
        logits_BV = log_scale.exp() * scores.scores_BV + level + budget_logit(valid_BV, num_keep_B)
        noisy_BV = logits_BV + logistic_noise(logits_BV)
        soft_BV = torch.sigmoid(noisy_BV / self.temperature).masked_fill(~valid_BV, 0.0)
        gate_BV = straight_through((noisy_BV > 0) & valid_BV, soft_BV)
        keep_BV = keep_topk(noisy_BV.detach(), valid_BV, num_keep_B)
        return Choice(keep_BV, scores.scores_BV, gate_BV, expected_B=gate_BV.sum(1))


def budget_logit(valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
    """fp32 (B, 1): log(k / (n - k)) of each row, within +- 7, so that a full budget stays finite."""
    count_B = valid_BV.sum(1).clamp(min=1)
    return (on(num_keep_B, count_B) / count_B)[:, None].clamp(1e-3, 1 - 1e-3).logit()


def logistic_noise(like: Tensor) -> Tensor:
    """Standard logistic noise of the shape of `like`, fp32, from torch's global generator."""
    return torch.rand_like(like, dtype=torch.float32).clamp(1e-7, 1 - 1e-7).logit()
