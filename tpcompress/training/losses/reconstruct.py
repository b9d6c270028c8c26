"""Error of dropped tokens when they are reconstructed from the retained ones.

R rows, V vision tokens, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp, pruned_stages, stage_sum
from tpcompress.training.losses.kl import checked_temperature
from tpcompress.training.passes import Pass

THROUGH = ("gate", "values")


def reconstruction_error(
    values_RVD: Tensor, target_RVD: Tensor, gate_RV: Tensor, valid_RV: Tensor, temperature: float = 0.1
) -> Tensor:
    """Error (R,) of the dropped tokens, reconstructed from the retained ones by similarity, fp32.

        w_dk = g_k exp(cos(t_d, t_k) / T) / sum_j g_j exp(cos(t_d, t_j) / T)       j, k other than d
        e_d  = |sum_k w_dk x_k - t_d|^2 / (mean_j |t_j - mean t|^2)
        loss = sum_d (1 - g_d) e_d / sum_d (1 - g_d)

    1 is the error of the row mean, 0 is exact reconstruction. Neither the similarities nor the last sum carry a
    gradient, so that opening the gate of a token that no other token resembles lowers the loss even if it is the only
    one.

    Args:
        values_RVD: x, hidden states of the retained tokens.
        target_RVD: t, hidden states before pruning; they get no gradient.
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
    """Normalised error of dropped tokens that are reconstructed from retained ones, at the stage; mean over rows.

    Original to this package; without parameters, O(V^2 D) per row.

    Args:
        through: `gate` trains the selection: gates weight both the sources and the missing tokens. `values` trains the
            hidden states that reach the stage, at a fixed selection.
        temperature: temperature of the similarity; a small one uses the nearest retained token only.
        weight: factor on the term.

    Raises:
        ValueError: unknown `through`, or a temperature that is not above 0.
    """

    name = "reconstruct"
    test_arguments = ({}, {"through": "values"})

    def __init__(self, through: str = "gate", temperature: float = 0.1, weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        if through not in THROUGH:
            raise ValueError(f"Loss 'reconstruct' takes through: {' or '.join(THROUGH)}, got {through!r}.")
        self.through, self.temperature = through, checked_temperature(temperature, self.name)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"} if self.through == "gate" else ())

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        terms = []
        for stage in pruned_stages(student):
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
