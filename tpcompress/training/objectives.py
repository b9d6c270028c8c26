"""Losses beside the label loss: distillation from the unpruned teacher, and the two terms of a learned gate.

B samples, S and N positions (teacher, student), C vocabulary; R rows, V vision tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.insertion.plan import Budget
from tpcompress.insertion.trace import Trace
from tpcompress.pruners import Pruner


def answer_logits(logits_BNC: Tensor, labels_BN: Tensor) -> Tensor:
    """Logits (A, C) that predict the A answer tokens: position i predicts label i + 1."""
    return logits_BNC[:, :-1][labels_BN[:, 1:] != -100]


def kl_to_teacher(
    student_BNC: Tensor, student_labels_BN: Tensor, teacher_BSC: Tensor, teacher_labels_BS: Tensor, temperature: float
) -> Tensor:
    """T^2 KL(teacher || student), mean over answer tokens (arXiv 1503.02531, section 2).

    The pruned student is shorter than its teacher. Text is never dropped, so the answer tokens are the same ones in
    the same order, and each side picks its own positions by its own labels.

    Raises:
        ValueError: the two sides do not predict the same number of answer tokens.
    """
    student_AC = answer_logits(student_BNC, student_labels_BN).float() / temperature
    teacher_AC = answer_logits(teacher_BSC, teacher_labels_BS).float() / temperature
    if student_AC.shape != teacher_AC.shape:
        raise ValueError(
            f"Teacher and student predict {len(teacher_AC)} and {len(student_AC)} answer tokens; a label right "
            f"after an image cannot be distilled, its predecessor may be dropped. Label assistant turns only."
        )
    kl = F.kl_div(student_AC.log_softmax(-1), teacher_AC.log_softmax(-1), reduction="batchmean", log_target=True)
    return kl * temperature**2


def budget_loss(gate_RV: Tensor, valid_RV: Tensor, num_keep_R: Tensor) -> Tensor:
    """Squared distance of the mean gate from the keep ratio. Zero for gates that are exact by construction."""
    tokens_R = valid_RV.sum(1).clamp(min=1)
    return ((gate_RV.masked_fill(~valid_RV, 0.0).sum(1) - num_keep_R) / tokens_R).square().mean()


def warm_up_loss(scores_RV: Tensor, keep_RV: Tensor, valid_RV: Tensor) -> Tensor:
    """Cross-entropy of softmax(scores) to another pruner's choice: -mean over its kept tokens of log softmax."""
    log_prob_RV = scores_RV.masked_fill(~valid_RV, -1e4).log_softmax(1)
    return -(log_prob_RV.masked_fill(~keep_RV, 0.0).sum(1) / keep_RV.sum(1).clamp(min=1)).mean()


def gate_losses(
    trace: Trace, budgets: Sequence[Budget], budget_weight: float, guide: Pruner | None, guide_weight: float
) -> dict[str, Tensor]:
    """The two terms of every stage that ran through a gate, summed over stages and weighted.

    Args:
        trace: of a forward call in mode `mask`.
        budgets: of the stages in that call; at full length the trace's counts do not fall.
        budget_weight: of `budget_loss`; 0 leaves it out.
        guide: pruner whose choice the scores imitate; None leaves `warm_up_loss` out.
        guide_weight: of `warm_up_loss`.
    """
    losses: dict[str, Tensor] = {}
    for stage in trace.stages:
        chosen, view = stage.selection, stage.view
        if chosen is None or chosen.gate_BV is None or view is None:
            continue
        counts = [min(budgets[stage.stage].count(n), m) for n, m in zip(stage.total, stage.vision_in, strict=True)]
        kept_R = torch.tensor(counts)
        if budget_weight:
            term = budget_weight * budget_loss(chosen.gate_BV, view.valid_BV, kept_R.to(chosen.gate_BV.device))
            losses["budget"] = losses["budget"] + term if "budget" in losses else term
        if guide is not None:
            with torch.no_grad():
                keep_RV = guide(view, kept_R).keep_BV
            term = guide_weight * warm_up_loss(chosen.scores_BV, keep_RV, view.valid_BV)
            losses["warm_up"] = losses["warm_up"] + term if "warm_up" in losses else term
    return losses
