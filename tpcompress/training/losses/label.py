"""The label loss: cross-entropy of the answer tokens.

A answer tokens, C vocabulary, B samples.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tpcompress.training.losses.base import Loss
from tpcompress.training.passes import Pass


def label_loss(logits_AC: Tensor, targets_A: Tensor) -> Tensor:
    """-log softmax(logits)[target], mean over answer tokens, in fp32."""
    return label_losses(logits_AC, targets_A).mean()


def label_losses(logits_AC: Tensor, targets_A: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each answer token, in fp32."""
    return F.cross_entropy(logits_AC.float(), targets_A, reduction="none")


def sample_losses(logits_AC: Tensor, targets_A: Tensor, sample_A: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """The label loss of each sample (B,), 0 without an answer, and its number of answer tokens (B,)."""
    each_A = label_losses(logits_AC, targets_A)
    zero_B = each_A.new_zeros(num_samples)
    count_B = zero_B.index_add(0, sample_A, each_A.new_ones(len(each_A)))
    return zero_B.index_add(0, sample_A, each_A) / count_B.clamp(min=1), count_B


class Label(Loss):
    """Cross-entropy of the answer tokens, as in fine-tuning without a pruner."""

    name = "label"

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        if not len(student.targets_A):
            return None
        return student.answer_mean(label_losses(student.logits_AC, student.targets_A))
