"""Learned gate: a small scorer trained with the model's own loss through a variance-preserving noise gate.

Ours; the estimators it was chosen from are in the training notes. Training happens at full length (mode `mask`):
    m  = soft_topk(standardise(score) / T, k)          T falls from 0.5 to 0.1, sum(m) = k exactly
    x' = mu + sqrt(m) (x - mu) + sqrt(1 - m) sigma eps      mu, sigma per channel over the batch
so a token with m near 0 carries noise of the right size instead of information. Inference keeps the hard top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.gate import noise_gate, soft_topk
from tpcompress.pruners.scorer import Scorer
from tpcompress.pruners.topk import central, grid_cells, keep_topk, standardise

CONDITIONS = ("none", "question")


class LearnedGate(Pruner):
    """keep = top-k of score(x_v, its 3 x 3 neighbours, mean of the image[, the question]).

    `condition: none` never sees the prompt, so it can be served before any prompt is known. `condition: question`
    lets each token attend to the prompt text: the scorer then does part of the visual search itself, and a wrong
    question breaks it. `reserve` tokens on a fixed grid are always kept (for use without fine-tuning the backbone).

    needs  nothing, or text.     gives  keep_BV, scores_BV, and in training at full length gate_BV and vision_BVD.
    Cost: a projection of each token to `width`, one V x V Gram matrix, one sort of V; with the question one projection
    of each token and word at full width, and V x S attention.
    """

    name = "learned_gate"
    differentiable = True
    starts_as = "novelty"

    def __init__(
        self,
        condition: str = "none",
        width: int = 64,
        reserve: int = 0,
        temperature_start: float = 0.5,
        temperature_end: float = 0.1,
    ) -> None:
        super().__init__()
        if condition not in CONDITIONS:
            raise ValueError(f"learned_gate has no condition '{condition}'; choose one of {', '.join(CONDITIONS)}.")
        if width < 1 or reserve < 0 or not 0 < temperature_end <= temperature_start:
            raise ValueError(
                f"learned_gate needs width >= 1, reserve >= 0 and 0 < temperature_end <= temperature_start, got "
                f"{width}, {reserve}, {temperature_end}, {temperature_start}."
            )
        self.condition, self.width, self.reserve = condition, width, reserve
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.progress = 0.0
        self.scorer: Scorer | None = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text"} if self.condition == "question" else ())

    @property
    def learned(self) -> bool:
        return True

    def build(self, hidden_size: int) -> None:
        if self.scorer is None:
            self.scorer = Scorer(hidden_size, self.width, with_text=self.condition == "question")
        elif self.scorer.norm.normalized_shape != (hidden_size,):
            have = self.scorer.norm.normalized_shape[0]
            raise ValueError(
                f"This learned_gate was built for width {have}, the model has {hidden_size}; make a new one."
            )

    def set_progress(self, progress: float) -> None:
        self.progress = min(max(progress, 0.0), 1.0)

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert self.scorer is not None, "learned_gate has no weights yet: attach it to a model first"
        scores_BV = standardise(self.scorer(tokens), tokens.valid_BV)
        if self.reserve:
            slots_B = num_keep_B.clamp(max=self.reserve)
            cell_BV = grid_cells(tokens.row_BV, tokens.col_BV, tokens.valid_BV, slots_B)
            reserved_BV = central(cell_BV, tokens.row_BV, tokens.col_BV, tokens.valid_BV)
            # Above all others by more than any temperature: a standardised score alone may reach the root of V.
            above_B1 = scores_BV.detach().masked_fill(~tokens.valid_BV, -torch.inf).amax(1, keepdim=True) + 20
            scores_BV = torch.where(reserved_BV, above_B1, scores_BV)
        keep_BV = keep_topk(scores_BV, tokens.valid_BV, num_keep_B)
        if not (self.training and tokens.soft):
            return Selection(keep_BV, scores_BV)
        temperature = self.temperature_start * (self.temperature_end / self.temperature_start) ** self.progress
        gate_BV = soft_topk(scores_BV / temperature, tokens.valid_BV, num_keep_B)
        return Selection(keep_BV, scores_BV, gate_BV, noise_gate(tokens.vision_BVD, gate_BV, tokens.valid_BV))
