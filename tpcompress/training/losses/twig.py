"""Label loss on the hidden states of a scorer that processes the text (TwigVLM).

B samples, S columns of the batch, D hidden size, C vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tpcompress.families import Parts
from tpcompress.insertion.answers import answer_places
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.losses.base import Loss, Ramp, pruned_stages, stage_sum
from tpcompress.training.losses.label import label_losses
from tpcompress.training.passes import Pass


class Twig(Loss):
    """Cross-entropy of the answer tokens from a scorer's own hidden states, through the model's last norm and head.

    Source: TwigVLM (arXiv 2503.14075), whose twig has its own norm and head. Here the model's norm and head are used;
    they get a gradient only if they train anyway. Mean over answer tokens, summed over stages.

    Raises:
        ValueError: at a call, a scorer after an earlier stage, which reads a shorter sequence than the labels.
    """

    name = "twig"

    def __init__(self, weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        self.norm: Any = None
        self.head: Any = None
        self.cap: float | None = None
        self.scale = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def prepare(self, model: nn.Module, parts: Parts, plan: PruningPlan | None) -> None:
        """Take the model's last norm and its output head."""
        self.norm, self.head = parts.final_norm, parts.model.get_output_embeddings()
        self.cap = getattr(parts.text_config, "final_logit_softcapping", None)
        self.scale = float(getattr(parts.text_config, "logit_scale", None) or 1.0)

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        terms = []
        for stage in pruned_stages(student):
            text_BSD = stage.selection.text_BSD
            if text_BSD is None or student.labels_BS is None or not len(student.targets_A):
                continue
            B, S = student.labels_BS.shape
            if text_BSD.shape[:2] != (B, S):
                raise ValueError(
                    f"Loss 'twig' needs a scorer that reads the whole sequence: stage {stage.trace.stage} reads "
                    f"{text_BSD.shape[1]} of {S} columns; put the twig scorer into the first stage."
                )
            place_A = answer_places(student.labels_BS, len(student.targets_A))
            hidden_AD = text_BSD.flatten(0, 1).index_select(0, place_A)
            terms.append(student.answer_mean(label_losses(self._logits(hidden_AD), student.targets_A)))
        return stage_sum(terms)

    def _logits(self, hidden_AD: Tensor) -> Tensor:
        # Scorers compute in fp32, the head in the model's dtype.
        normed_AD = self.norm(hidden_AD.to(self.head.weight.dtype))
        logits_AC = self.head(normed_AD).float() * self.scale
        return self.cap * torch.tanh(logits_AC / self.cap) if self.cap else logits_AC
