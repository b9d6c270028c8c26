"""Binary cross-entropy between soft gates and their own top-k, which makes the gates decided.

R rows, V vision tokens.
"""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.topk import keep_topk
from tpcompress.training.losses.base import Loss, pruned_stages, stage_sum
from tpcompress.training.passes import Pass

SMALLEST = 1e-6


def gate_cross_entropy(gate_RV: Tensor, keep_RV: Tensor) -> Tensor:
    """-(h log m + (1 - h) log(1 - m)) (R, V) of gates m and selection h, fp32; m is clamped to [1e-6, 1 - 1e-6]."""
    m_RV = gate_RV.float().clamp(SMALLEST, 1 - SMALLEST)
    return -(keep_RV * m_RV.log() + (~keep_RV) * (1 - m_RV).log())


class BCE(Loss):
    """Binary cross-entropy of the gates to their own detached top-k; mean over tokens, then rows.

    Source: VisionSelector (arXiv 2510.16598), with a weight that rises from 0.1 to 2. The term measures how decided the
    gates are, not whether they select the right tokens. It applies to gates that are soft in the forward pass; for 0/1
    gates it is 0.
    """

    name = "bce"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        terms = []
        for stage in pruned_stages(student):
            if stage.selection.gate_BV is not None:
                gate_RV = stage.gate_RV()
                hard_RV = keep_topk(gate_RV.detach(), stage.valid_RV, stage.num_keep_R)
                terms.append(stage.token_mean(gate_cross_entropy(gate_RV, hard_RV)))
        return stage_sum(terms)
