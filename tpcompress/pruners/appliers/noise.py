"""Noise gate: at full length, what a token loses in content it gains in noise of the same size.

B rows, V tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.appliers.gather import cut, selected
from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.gate_components import Applier, Choice


class Noise(Applier):
    """x'_j = mu + sqrt(m_j) (x_j - mu) + sqrt(1 - m_j) sigma eps;     mu, sigma per channel over the batch.

    Destroys direction, which is what survives a norm, and edits the stage's input alone: no layer after it is touched.
    Needs full length; in mode `drop` the sequence is cut as by `gather`. With hard gates training is not inference:
    dropped tokens are noise, but keep their places in the softmax.
    Source: the variance-preserving gate of AutoSelect (2603.07135), here around the mean of each channel.
    """

    name = "noise"
    full_length = True

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        if choice.gate_BV is None or not tokens.soft:
            return cut(tokens, choice)
        return selected(choice, vision_BVD=noise_gate(tokens.vision_BVD, choice.gate_BV, tokens.valid_BV))


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
