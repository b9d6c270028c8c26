"""Warm start of a scorer: imitation of a training-free pruner.

R rows, V vision tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpcompress.families import Parts
from tpcompress.insertion.plan import PruningPlan
from tpcompress.pruners import Pruner, create
from tpcompress.pruners.topk import standardise
from tpcompress.pruners.views import TOWER_FIELDS
from tpcompress.training.losses.base import Loss, Ramp, pruned_stages, stage_sum
from tpcompress.training.losses.kl import checked_temperature
from tpcompress.training.passes import Pass

OF = ("choice", "scores")


def choice_loss(scores_RV: Tensor, keep_RV: Tensor, valid_RV: Tensor) -> Tensor:
    """Cross-entropy (R,) of softmax(scores) to a pruner's selection: -mean of log softmax over its kept tokens."""
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
    """The scores imitate a training-free pruner at the budget of the step; mean over rows, summed over stages.

    The weight should fall to 0 early in the phase, because this term only initialises the scorer.

    Args:
        pruner: name, or `{"type": name, **arguments}`, of a pruner without weights. It may read only views that the
            plan's learned pruners read as well.
        of: `choice` imitates the retained tokens, `scores` the scores of all tokens.
        temperature: softmax temperature for `scores`.
        weight: factor on the term.

    Raises:
        ValueError: a pruner with weights, or one that retains nothing; unknown `of`; with a plan, a pruner that needs
            views which a learned pruner of the plan does not read.
    """

    name = "imitate"
    test_arguments = ({}, {"of": "scores", "pruner": "novelty"})

    def __init__(
        self,
        pruner: str | dict = "divprune",
        of: str = "choice",
        temperature: float = 1.0,
        weight: float | Ramp = 1.0,
    ) -> None:
        super().__init__(weight)
        if of not in OF:
            raise ValueError(f"Loss 'imitate' takes of: {' or '.join(OF)}, got {of!r}.")
        self.guide: Pruner = create(pruner)
        if self.guide.learned or self.guide.keeps_none:
            raise ValueError(
                f"Loss 'imitate': pruner '{self.guide.name}' must have no weights and retain tokens; use e.g. divprune."
            )
        self.pruner, self.of, self.temperature = pruner, of, checked_temperature(temperature, self.name)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def prepare(self, model: nn.Module, parts: Parts, plan: PruningPlan | None) -> None:
        """Check that the learned pruners read the views that the imitated pruner needs."""
        for stage in plan.stages if plan is not None else []:
            lacking = sorted(self.guide.needs - stage.pruner.needs)
            if self.guide.needs & TOWER_FIELDS.keys() and self.guide.tower_layers != stage.pruner.tower_layers:
                lacking.append(f"layers {self.guide.tower_layers} of the tower")
            if stage.pruner.learned and lacking:
                raise ValueError(
                    f"Loss 'imitate': pruner '{self.guide.name}' needs {', '.join(lacking)}, which "
                    f"'{stage.pruner.name}' at layer {stage.layer} does not read; "
                    f"imitate one that reads the same views, e.g. novelty."
                )

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        terms = []
        for stage in pruned_stages(student):
            scores_RV, valid_RV = stage.selection.scores_BV, stage.valid_RV
            if not scores_RV.requires_grad:
                continue
            # Without autocast, as in stages, so that the selection is the one that the pruner makes by itself.
            with torch.no_grad(), torch.autocast(valid_RV.device.type, enabled=False):
                # The dummy token of an empty row must be kept, too.
                target = self.guide(stage.view, torch.tensor(stage.counts).clamp(min=1))
            if self.of == "choice":
                terms.append(stage.row_mean(choice_loss(scores_RV, target.keep_BV, valid_RV)))
            else:
                terms.append(stage.row_mean(scores_loss(scores_RV, target.scores_BV, valid_RV, self.temperature)))
        return stage_sum(terms)
