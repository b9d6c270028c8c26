"""The label loss of a scorer that reads the text by itself: it must be able to answer alone.

B samples, S columns of the batch, D hidden size, C vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.answers import answer_places
from tpcompress.insertion.attach import base_of
from tpcompress.training.losses.base import Loss, Ramp, chosen_stages, stage_sum
from tpcompress.training.losses.label import label_loss
from tpcompress.training.passes import Pass


class Twig(Loss):
    """Cross-entropy of the answer tokens from a scorer's own hidden states, through the model's last norm and head.

    Source: TwigVLM (arXiv 2503.14075), whose twig has a norm and head of its own; here those of the model serve, and
    learn from the term only where they train anyway. Mean over answer tokens, summed over stages.

    Raises:
        ValueError: at a call, a scorer behind an earlier stage: it sees a shorter sequence than the labels.
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

    def prepare(self, module: Any) -> None:
        """Take the model's last norm and its output head."""
        self.norm, self.head = module.parts.final_norm, base_of(module.model).get_output_embeddings()
        self.cap = getattr(module.parts.text_config, "final_logit_softcapping", None)
        self.scale = float(getattr(module.parts.text_config, "logit_scale", None) or 1.0)

    def __call__(self, here: Pass, taught: Pass | None) -> Tensor | None:
        terms = []
        for stage in chosen_stages(here):
            text_BSD = stage.selection.text_BSD
            if text_BSD is None or here.labels_BS is None or not len(here.targets_A):
                continue
            B, S = here.labels_BS.shape
            if text_BSD.shape[:2] != (B, S):
                raise ValueError(
                    f"Loss 'twig' needs a scorer that sees the whole sequence: stage {stage.trace.stage} sees "
                    f"{text_BSD.shape[1]} of {S} columns; give the first stage its scorer."
                )
            place_A = answer_places(here.labels_BS, len(here.targets_A))
            hidden_AD = text_BSD.flatten(0, 1).index_select(0, place_A)
            terms.append(label_loss(self._logits(hidden_AD), here.targets_A))
        return stage_sum(terms)

    def _logits(self, hidden_AD: Tensor) -> Tensor:
        # A scorer works in fp32, the head in the model's dtype.
        normed_AD = self.norm(hidden_AD.to(self.head.weight.dtype))
        logits_AC = self.head(normed_AD).float() * self.scale
        return self.cap * torch.tanh(logits_AC / self.cap) if self.cap else logits_AC
