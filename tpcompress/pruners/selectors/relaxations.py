"""Relaxations of top-k that selectors share: soft top-k weights and the straight-through estimator.

B rows, V tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.topk import on

RELAXATIONS = ("sigmoid", "laplace")


def known_relaxation(selector: str, relaxation: str) -> str:
    """The relaxation itself.

    Raises:
        ValueError: it is not in `RELAXATIONS`.
    """
    if relaxation not in RELAXATIONS:
        raise ValueError(f"{selector} has no relaxation '{relaxation}'; choose one of {', '.join(RELAXATIONS)}.")
    return relaxation


def soft_topk(scores_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor, relaxation: str = "sigmoid") -> Tensor:
    """Weights m = F(s + t) with t such that each row's weights sum to its count.

    The dependence of t on s enters the gradient through the implicit function theorem: dt/ds_j = -m'_j / sum_i m'_i
    with m' = F'(s + t), so the sum stays fixed to first order.

    Args:
        scores_BV: scores already divided by the temperature (B, V).
        valid_BV: bool (B, V).
        num_keep_B: int64 (B,), at most the number of valid tokens.
        relaxation: one of `RELAXATIONS`.

    Returns:
        (B, V) in [0, 1], differentiable; 0 on padding.
    """
    target_B1 = on(num_keep_B, scores_BV)[:, None].to(scores_BV.dtype)
    with torch.no_grad():
        if relaxation == "sigmoid":
            shift_B1 = sigmoid_shift(scores_BV, valid_BV, target_B1)
            weight_BV = torch.sigmoid(scores_BV + shift_B1)
            slope_BV = weight_BV * (1 - weight_BV)
        else:
            shift_B1 = laplace_shift(scores_BV, valid_BV, target_B1)
            slope_BV = (-(scores_BV + shift_B1).abs()).exp() / 2
        slope_BV = slope_BV.masked_fill(~valid_BV, 0.0)
        slope_BV = slope_BV / slope_BV.sum(1, keepdim=True).clamp(min=1e-9)
    centre_B1 = (slope_BV * scores_BV.masked_fill(~valid_BV, 0.0)).sum(1, keepdim=True)
    shifted_BV = scores_BV - centre_B1 + (centre_B1.detach() + shift_B1)
    weight_BV = torch.sigmoid(shifted_BV) if relaxation == "sigmoid" else laplace_cdf(shifted_BV)
    return weight_BV.masked_fill(~valid_BV, 0.0)


def laplace_cdf(x: Tensor) -> Tensor:
    """e^x / 2 below 0, 1 - e^-x / 2 from 0 on."""
    # Of each branch only its own half is computed, so that no gradient is inf * 0.
    return torch.where(x < 0, x.clamp(max=0).exp() / 2, 1 - (-x.clamp(min=0)).exp() / 2)


def sigmoid_shift(scores_BV: Tensor, valid_BV: Tensor, target_B1: Tensor) -> Tensor:
    """The t (B, 1) with sum(sigmoid(s + t)) = target over the valid tokens of each row, by bisection."""
    there_B1 = valid_BV.any(1, keepdim=True)
    low_B1 = -scores_BV.masked_fill(~valid_BV, -torch.inf).amax(1, keepdim=True) - 20
    high_B1 = -scores_BV.masked_fill(~valid_BV, torch.inf).amin(1, keepdim=True) + 20
    low_B1, high_B1 = low_B1.masked_fill(~there_B1, 0.0), high_B1.masked_fill(~there_B1, 0.0)
    for _ in range(40):
        middle_B1 = (low_B1 + high_B1) / 2
        total_B1 = torch.sigmoid(scores_BV + middle_B1).masked_fill(~valid_BV, 0.0).sum(1, keepdim=True)
        low_B1 = torch.where(total_B1 < target_B1, middle_B1, low_B1)
        high_B1 = torch.where(total_B1 < target_B1, high_B1, middle_B1)
    return (low_B1 + high_B1) / 2


def laplace_shift(scores_BV: Tensor, valid_BV: Tensor, target_B1: Tensor) -> Tensor:
    """The t (B, 1) with sum(F(s + t)) = target over the valid tokens of each row, in closed form, O(V log V).

    At t = -s_j the sum is known from running sums over the sorted scores, which says how many tokens a lie above the
    threshold. There, with u = e^t, A = sum of e^-s over those above and C = sum of e^s over those below,
        a - A / (2 u) + C u / 2 = k,     so u = (d + sqrt(d^2 + A C)) / C = A / (sqrt(d^2 + A C) - d),   d = k - a.
    All in logarithms and fp64, since e^s overflows.
    """
    V = scores_BV.shape[1]
    count_B1 = valid_BV.sum(1, keepdim=True)
    # A budget of everything has no finite threshold; this far from it a weight is 1 in fp32.
    goal_B1 = target_B1.double().minimum(count_B1.double() - 1e-9).clamp(min=1e-9)
    sorted_BV = scores_BV.double().masked_fill(~valid_BV, -torch.inf).sort(dim=1, descending=True).values
    none_B1 = torch.full_like(goal_B1, -torch.inf)
    above_BN = torch.cat([none_B1, (-sorted_BV).logcumsumexp(1)], 1)  # log A if the first 0, 1, .. V lie above
    below_BN = torch.cat([sorted_BV.flip(1).logcumsumexp(1).flip(1), none_B1], 1)  # and log C
    ahead_V = torch.arange(1, V + 1, device=scores_BV.device)
    reached_BV = ahead_V - (sorted_BV + above_BN[:, 1:]).exp() / 2 + (below_BN[:, 1:] - sorted_BV).exp() / 2
    above_B1 = ((reached_BV < goal_B1) & (ahead_V <= count_B1)).sum(1, keepdim=True)
    log_a_B1, log_c_B1 = above_BN.gather(1, above_B1), below_BN.gather(1, above_B1)
    d_B1 = goal_B1 - above_B1
    log_d_B1 = d_B1.abs().log()
    log_root_B1 = torch.logaddexp(2 * log_d_B1, log_a_B1 + log_c_B1) / 2
    log_sum_B1 = torch.logaddexp(log_d_B1, log_root_B1)
    shift_B1 = torch.where(d_B1 >= 0, log_sum_B1 - log_c_B1, log_a_B1 - log_sum_B1)
    return shift_B1.masked_fill(count_B1 == 0, 0.0).to(scores_BV.dtype)


def straight_through(hard_BV: Tensor, soft_BV: Tensor) -> Tensor:
    """The hard weights, bit for bit, with the gradient of the soft ones."""
    return hard_BV.to(soft_BV.dtype) + (soft_BV - soft_BV.detach())
