"""REINFORCE: sampled selections with a lower label loss than the baseline become more likely.

B samples, R rows of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.training.losses.base import Loss, Ramp, pruned_stages
from tpcompress.training.losses.label import sample_losses
from tpcompress.training.passes import Pass

BASELINES = ("others", "teacher")


def score_function(cost_B: Tensor, log_prob_B: Tensor, counts_B: Tensor, baseline_B: Tensor | None = None) -> Tensor:
    """A surrogate whose gradient is that of the expected cost: mean of (cost - baseline) log p over samples.

    The baseline of a sample does not depend on its own draw, so it lowers the variance without a bias.

    Args:
        cost_B: cost of each draw; it gets no gradient.
        log_prob_B: log probability of each draw.
        counts_B: bool, the samples that count.
        baseline_B: None uses the mean cost of the other samples (leave one out), or 0 for a single sample.
    """
    cost_B = cost_B.detach().masked_fill(~counts_B, 0.0)
    num = counts_B.sum()
    if baseline_B is None:
        baseline_B = (cost_B.sum() - cost_B) / (num - 1).clamp(min=1)
    advantage_B = (cost_B - baseline_B.detach()).masked_fill(~counts_B, 0.0)
    return (advantage_B * log_prob_B.float()).sum() / num.clamp(min=1)


class ScoreFunction(Loss):
    """REINFORCE (Williams 1992) on the label loss of each sample, for selectors that draw their sets.

    Only the gradient of the term is meaningful, not its value. Samples without images or answers do not count.

    Args:
        baseline: `others` subtracts the mean loss of the other samples of the batch (leave one out, as in Kool et al.
            2019), which has an effect from two samples on; `teacher` subtracts the teacher's loss on the same sample.
        weight: factor on the term.

    Raises:
        ValueError: unknown baseline; at a call, a cached teacher, which has no label loss.
    """

    name = "score_function"
    test_arguments = ({}, {"baseline": "teacher"})

    def __init__(self, baseline: str = "others", weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        if baseline not in BASELINES:
            raise ValueError(f"Loss 'score_function' has no baseline '{baseline}'; choose of {', '.join(BASELINES)}.")
        self.baseline = baseline

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"} if self.baseline == "others" else {"gate", "teacher"})

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        drawn_B = drawn_log_prob(student)
        if drawn_B is None or not len(student.targets_A):
            return None
        log_prob_B, has_draw_B = drawn_B
        logits_AC = student.logits_AC.detach()
        cost_B, count_B = sample_losses(logits_AC, student.targets_A, student.sample_A, student.num_samples)
        baseline_B = self._teacher_cost(teacher) if self.baseline == "teacher" else None
        return score_function(cost_B, log_prob_B, has_draw_B & (count_B > 0), baseline_B)

    def _teacher_cost(self, teacher: Pass | None) -> Tensor:
        if teacher is None or teacher.top_indices_AT is not None:
            raise ValueError("Loss 'score_function' cannot use a cached teacher as baseline; use baseline: others.")
        return sample_losses(teacher.logits_AC, teacher.targets_A, teacher.sample_A, teacher.num_samples)[0]


def drawn_log_prob(student: Pass) -> tuple[Tensor, Tensor] | None:
    """Log probability (B,) of all draws for each sample, and whether it has a draw; None without any draw."""
    stages = [stage for stage in pruned_stages(student) if stage.selection.log_prob_B is not None]
    if not stages:
        return None
    log_prob_B = torch.zeros(student.num_samples, device=student.targets_A.device)
    drawn = set()
    for stage in stages:
        log_prob_R, owner = stage.selection.log_prob_B, stage.trace.owner
        assert log_prob_R is not None
        owner_R = torch.tensor(owner).to(log_prob_R.device, non_blocking=True)
        log_prob_B = log_prob_B.index_add(0, owner_R, log_prob_R.float().masked_fill(~stage.real_R, 0.0))
        drawn |= {b for b, count in zip(owner, stage.trace.vision_in, strict=True) if count}
    has_draw_B = torch.tensor([b in drawn for b in range(student.num_samples)])
    return log_prob_B, has_draw_B.to(log_prob_B.device, non_blocking=True)
