"""Warm start: a scorer first learns what a rule without weights already knows.

R rows, V vision tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.pruners import Pruner, create
from tpcompress.pruners.topk import standardise
from tpcompress.pruners.views import TOWER_FIELDS
from tpcompress.training.losses.base import Loss, Ramp, chosen_stages, stage_sum
from tpcompress.training.losses.kl import checked_temperature
from tpcompress.training.passes import Pass

OF = ("choice", "scores")


def choice_loss(scores_RV: Tensor, keep_RV: Tensor, valid_RV: Tensor) -> Tensor:
    """Cross-entropy (R,) of softmax(scores) to another pruner's choice: -mean over its kept tokens of log softmax."""
    log_prob_RV = scores_RV.float().masked_fill(~valid_RV, -1e4).log_softmax(1)
    kept_RV = keep_RV & valid_RV
    return -log_prob_RV.masked_fill(~kept_RV, 0.0).sum(1) / kept_RV.sum(1).clamp(min=1)


def scores_loss(scores_RV: Tensor, target_RV: Tensor, valid_RV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL (R,) of the softmaxes of two sets of scores, each standardised per row and divided by the temperature."""
    log_q_RV, log_p_RV = (
        (standardise(x, valid_RV) / temperature).masked_fill(~valid_RV, -1e4).log_softmax(1)
        for x in (scores_RV, target_RV.detach())
    )
    return (log_p_RV.exp() * (log_p_RV - log_q_RV)).masked_fill(~valid_RV, 0.0).sum(1)


class Imitate(Loss):
    """The scores imitate a pruner without weights, at the step's own budget; mean over rows, summed over stages.

    Let the weight fall to 0 early: imitation is where training starts, not where it should end.

    Args:
        pruner: name, or `{"type": name, **arguments}`, of a pruner without weights that reads the vision tokens, and no
            view that the plan's learned pruners do not read themselves.
        of: `choice`, the tokens it retains, or `scores`, what it thinks of every token.
        temperature: of both softmaxes of `scores`.
        weight: of the term.

    Raises:
        ValueError: a pruner with weights, or one that retains nothing; unknown `of`; with a plan, one that needs views
            which a learned pruner of it lacks.
    """

    name = "imitate"

    def __init__(
        self,
        pruner: str | dict = "divprune",
        of: str = "choice",
        temperature: float = 1.0,
        weight: float | Ramp = 1.0,
    ) -> None:
        super().__init__(weight)
        if of not in OF:
            raise ValueError(f"Loss 'imitate' is of {' or '.join(OF)}, got {of!r}.")
        self.guide: Pruner = create(pruner)
        if self.guide.learned or self.guide.keeps_none:
            raise ValueError(f"Loss 'imitate': pruner '{self.guide.name}' must have no weights, and retain something.")
        self.pruner, self.of, self.temperature = pruner, of, checked_temperature(temperature, self.name)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def prepare(self, module: Any) -> None:
        """See that the learned pruners show the guide what it needs."""
        for stage in module.plan.stages if module.plan is not None else []:
            lacking = sorted(self.guide.needs - stage.pruner.needs)
            if self.guide.needs & TOWER_FIELDS.keys() and self.guide.tower_layers != stage.pruner.tower_layers:
                lacking.append(f"layers {self.guide.tower_layers} of the tower")
            if stage.pruner.learned and lacking:
                raise ValueError(
                    f"Loss 'imitate': pruner '{self.guide.name}' needs {', '.join(lacking)}, which "
                    f"'{stage.pruner.name}' at layer {stage.layer} does not read; "
                    f"take a guide of its views, e.g. novelty."
                )

    def __call__(self, here: Pass, taught: Pass | None) -> Tensor | None:
        terms = []
        for stage in chosen_stages(here):
            scores_RV, valid_RV = stage.selection.scores_BV, stage.valid_RV
            if not scores_RV.requires_grad:
                continue
            # Out of mixed precision, as stages ask: the guide's choice is the one it makes as a pruner.
            with torch.no_grad(), torch.autocast(valid_RV.device.type, enabled=False):
                # A stand-in is a token like any other to the guide, which must keep one.
                target = self.guide(stage.view, torch.tensor(stage.counts).clamp(min=1))
            if self.of == "choice":
                terms.append(stage.row_mean(choice_loss(scores_RV, target.keep_BV, valid_RV)))
            else:
                terms.append(stage.row_mean(scores_loss(scores_RV, target.scores_BV, valid_RV, self.temperature)))
        return stage_sum(terms)
