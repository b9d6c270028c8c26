"""What is dropped should be redundant: retained tokens must be able to say what it was.

R rows, V vision tokens, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp, chosen_stages, stage_sum
from tpcompress.training.losses.kl import checked_temperature
from tpcompress.training.passes import Pass

THROUGH = ("gate", "values")


def reconstruction_error(
    values_RVD: Tensor, target_RVD: Tensor, gate_RV: Tensor, valid_RV: Tensor, temperature: float = 0.1
) -> Tensor:
    """Error (R,) of the dropped tokens, rebuilt from the retained ones by similarity, fp32.

        w_dk = g_k exp(cos(t_d, t_k) / T) / sum_j g_j exp(cos(t_d, t_j) / T)       j, k other than d
        e_d  = |sum_k w_dk x_k - t_d|^2 / (mean_j |t_j - mean t|^2)
        loss = sum_d (1 - g_d) e_d / sum_d (1 - g_d)

    so 1 is as far off as the mean of the row, and 0 is no loss at all. Neither similarities nor the last sum carry a
    gradient: opening the gate of a token that nobody can rebuild must pay even if it is the only one.

    Args:
        values_RVD: x, what the retained tokens carry.
        target_RVD: t, what the tokens were; no gradient reaches them.
        gate_RV: g in [0, 1], 0 on padding.
        valid_RV: False on padding.
        temperature: T.
    """
    target_RVD = target_RVD.detach().float()
    unit_RVD = F.normalize(target_RVD, dim=-1)
    pair_RVV = (unit_RVD @ unit_RVD.mT - 1) / temperature
    itself_VV = torch.eye(gate_RV.shape[1], dtype=torch.bool, device=gate_RV.device)
    near_RVV = pair_RVV.exp().masked_fill(itself_VV, 0.0) * gate_RV.float()[:, None]
    weight_RVV = near_RVV / near_RVV.sum(-1, keepdim=True).clamp(min=1e-12)
    count_R11 = valid_RV.sum(1).clamp(min=1)[:, None, None]
    mean_R1D = target_RVD.masked_fill(~valid_RV[..., None], 0.0).sum(1, keepdim=True) / count_R11
    spread_RV = (target_RVD - mean_R1D).square().sum(-1).masked_fill(~valid_RV, 0.0)
    scale_R1 = spread_RV.sum(1, keepdim=True) / count_R11[..., 0]
    error_RV = (weight_RVV @ values_RVD.float() - target_RVD).square().sum(-1) / scale_R1.clamp(min=1e-6)
    dropped_RV = (1 - gate_RV.float()).masked_fill(~valid_RV, 0.0)
    return (dropped_RV * error_RV).sum(1) / dropped_RV.detach().sum(1).clamp(min=1e-6)


class Reconstruct(Loss):
    """Normalised error of dropped tokens that are rebuilt from retained ones, at the stage; mean over rows.

    Ours; parameter-free, O(V^2 D) per row.

    Args:
        through: `gate` moves the choice: the gates weigh who rebuilds and what is missing. `values` moves the hidden
            states that reach the stage, and takes the choice as it is.
        temperature: of the similarity; small means the nearest retained token alone.
        weight: of the term.

    Raises:
        ValueError: unknown `through`, or a temperature that is not above 0.
    """

    name = "reconstruct"

    def __init__(self, through: str = "gate", temperature: float = 0.1, weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        if through not in THROUGH:
            raise ValueError(f"Loss 'reconstruct' goes through {' or '.join(THROUGH)}, got {through!r}.")
        self.through, self.temperature = through, checked_temperature(temperature, self.name)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"} if self.through == "gate" else ())

    def __call__(self, here: Pass, taught: Pass | None) -> Tensor | None:
        terms = []
        for stage in chosen_stages(here):
            x_RVD = stage.view.vision_BVD
            if self.through == "gate":
                if stage.selection.gate_BV is None:
                    continue
                values_RVD, gate_RV = x_RVD.detach(), stage.gate_RV()
            elif x_RVD.requires_grad:
                values_RVD, gate_RV = x_RVD, (stage.selection.keep_BV & stage.valid_RV).float()
            else:
                continue
            with torch.autocast(x_RVD.device.type, enabled=False):
                error_R = reconstruction_error(values_RVD, x_RVD, gate_RV, stage.valid_RV, self.temperature)
            terms.append(stage.row_mean(error_R))
        return stage_sum(terms)
