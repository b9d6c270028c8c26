"""Exact budgets that a gradient passes: soft top-k weights and the noise gate that spends them.

B rows, V tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.topk import on


def soft_topk(scores_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
    """Weights m = sigmoid(s + t) with t such that each row's weights sum to its count.

    t is found by bisection; its dependence on s enters the gradient through the implicit function theorem:
    dt/ds_j = -m'_j / sum_i m'_i with m' = m (1 - m), so the sum stays fixed to first order.

    Args:
        scores_BV: scores already divided by the temperature (B, V).
        valid_BV: bool (B, V).
        num_keep_B: int64 (B,), at most the number of valid tokens.

    Returns:
        (B, V) in [0, 1], differentiable; 0 on padding.
    """
    target_B1 = on(num_keep_B, scores_BV)[:, None].to(scores_BV.dtype)
    with torch.no_grad():
        low_B1 = -scores_BV.masked_fill(~valid_BV, -torch.inf).amax(1, keepdim=True) - 20
        high_B1 = -scores_BV.masked_fill(~valid_BV, torch.inf).amin(1, keepdim=True) + 20
        for _ in range(40):
            middle_B1 = (low_B1 + high_B1) / 2
            total_B1 = torch.sigmoid(scores_BV + middle_B1).masked_fill(~valid_BV, 0.0).sum(1, keepdim=True)
            low_B1 = torch.where(total_B1 < target_B1, middle_B1, low_B1)
            high_B1 = torch.where(total_B1 < target_B1, high_B1, middle_B1)
        shift_B1 = (low_B1 + high_B1) / 2
        weight_BV = torch.sigmoid(scores_BV + shift_B1)
        slope_BV = (weight_BV * (1 - weight_BV)).masked_fill(~valid_BV, 0.0)
        slope_BV = slope_BV / slope_BV.sum(1, keepdim=True).clamp(min=1e-9)
    centre_B1 = (slope_BV * scores_BV.masked_fill(~valid_BV, 0.0)).sum(1, keepdim=True)
    shifted_BV = scores_BV - centre_B1 + (centre_B1.detach() + shift_B1)
    return torch.sigmoid(shifted_BV).masked_fill(~valid_BV, 0.0)


def noise_gate(x_BVD: Tensor, gate_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """mu + sqrt(m) (x - mu) + sqrt(1 - m) sigma eps: full information at m = 1, pure noise of equal size at m = 0.

    Args:
        x_BVD: vision tokens (B, V, D).
        gate_BV: m in [0, 1]; the gradient reaches it.
        valid_BV: tokens that count for mu and sigma.
    """
    m_BV1 = gate_BV[..., None].float()
    real = valid_BV[..., None]
    count = valid_BV.sum().clamp(min=1)
    with torch.no_grad():
        mu_D = x_BVD.float().masked_fill(~real, 0.0).sum((0, 1)) / count
        sigma_D = ((x_BVD.float() - mu_D).masked_fill(~real, 0.0).square().sum((0, 1)) / count).sqrt()
        noise_BVD = torch.randn_like(x_BVD, dtype=torch.float32) * sigma_D
    signal_BVD = m_BV1.clamp(min=1e-6).sqrt() * (x_BVD.float() - mu_D)
    return (mu_D + signal_BVD + (1 - m_BV1).clamp(min=1e-6).sqrt() * noise_BVD).to(x_BVD.dtype)
