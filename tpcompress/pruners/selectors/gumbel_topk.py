"""Gumbel top-k: a set drawn without replacement, and its log probability.

B rows, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.gate_components import Choice, Scores, Selector
from tpcompress.pruners.topk import on, rank


class GumbelTopK(Selector):
    """Exploring, keep = top-k of s / c + g, g Gumbel noise: a draw from Plackett-Luce with logits s / c.

    With the k best in the order z_1, .. z_k of their noisy scores,
        log p = sum_{j <= k} [ s_{z_j} / c - log sum_{v not among z_1 .. z_{j-1}} e^{s_v / c} ],
    the probability of the ordered set, whose gradient is an unbiased score function as that of the set is. c, the scale
    of the noise, goes from `noise_start` to `noise_end` in equal ratios.

    gives  keep_BV = top-k of s; exploring the drawn set, and log_prob_B for a score-function loss. No gate: any kernel
    and any cut sequence will do, the model is a black box.
    Source: Kool et al. (1903.06059), section 2. Defaults are ours. Cost: one draw per token, two sorts of V.
    """

    name = "gumbel_topk"

    def __init__(self, noise_start: float = 1.0, noise_end: float = 0.5) -> None:
        super().__init__()
        if not 0 < noise_end <= noise_start:
            raise ValueError(f"gumbel_topk needs 0 < noise_end <= noise_start, got {noise_end} and {noise_start}.")
        self.noise_start, self.noise_end = noise_start, noise_end

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        scores_BV, log_prob_B = scores.scores_BV, None
        place_BV = rank(scores_BV, valid_BV)
        if explore:
            logits_BV = scores_BV / (self.noise_start * (self.noise_end / self.noise_start) ** self.progress)
            place_BV = rank(logits_BV.detach() + gumbel_noise(logits_BV), valid_BV)
            log_prob_B = plackett_luce(logits_BV, place_BV, valid_BV, num_keep_B)
        keep_BV = (place_BV < on(num_keep_B, place_BV)[:, None]) & valid_BV
        return Choice(keep_BV, scores_BV, log_prob_B=log_prob_B)


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of `like`, fp32, from torch's global generator."""
    # -log of a uniform number is exponential; drawn as such its small values are not rounded to 0.
    return -torch.empty_like(like, dtype=torch.float32).exponential_().clamp(min=1e-30).log()


def plackett_luce(logits_BV: Tensor, place_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
    """Log probability (B,) of drawing the first k tokens of an order, one after the other, without replacement.

    Args:
        logits_BV: real numbers (B, V); the gradient reaches them.
        place_BV: int64, the place of each token in the order, 0 first; padding last.
        valid_BV: bool (B, V).
        num_keep_B: int64 (B,), k of each row, at most its number of valid tokens.
    """
    # Padding at a finite depth: where nothing is left, -inf would be NaN in the backward pass.
    best_B1 = logits_BV.detach().masked_fill(~valid_BV, -torch.inf).amax(1, keepdim=True).clamp(min=-1e30)
    worst_B1 = logits_BV.detach().masked_fill(~valid_BV, torch.inf).amin(1, keepdim=True).clamp(max=1e30)
    centred_BV = (logits_BV - best_B1).masked_fill(~valid_BV, 0.0)
    centred_BV = torch.where(valid_BV, centred_BV, (worst_B1 - best_B1).clamp(max=0) - 60)
    ordered_BV = centred_BV.gather(1, place_BV.argsort(1))
    left_BV = ordered_BV.flip(1).logcumsumexp(1).flip(1)
    chosen_BV = torch.arange(place_BV.shape[1], device=place_BV.device) < on(num_keep_B, place_BV)[:, None]
    return (ordered_BV - left_BV).masked_fill(~chosen_BV, 0.0).sum(1)
