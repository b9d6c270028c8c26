"""The oracle: a rule that is told which tokens each question rests on. A line to measure rules against, not a rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpcompress.evaluation.tasks import Task
from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.pruners import Pruner, Selection, TokenView
from tpcompress.pruners.topk import hash_uniform, keep_topk


class Oracle(Pruner):
    """score(v) = its place in the evidence of the question, before random others.

    The questions come in the order of the task, one per row of the budget: an oracle serves one test.
    It has no place in lists of pruners, since no model could follow it.

    Args:
        evidence: for every question in turn, its tokens, the most needed first.
    """

    name = "oracle"

    def __init__(self, evidence: Sequence[Sequence[int]] = ()) -> None:
        super().__init__()
        self.evidence = evidence
        self._next = 0

    @property
    def prompt_dependent(self) -> bool:
        """The question decides what is kept: questions never share a sequence."""
        return True

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        """Select the evidence of the next B questions.

        Raises:
            ValueError: more rows than questions: the task has several images in a row, or the test was run twice.
        """
        B, V = tokens.valid_BV.shape
        asked = self.evidence[self._next : self._next + B]
        if len(asked) < B:
            raise ValueError(
                f"The oracle knows {len(self.evidence)} questions, and was asked for more; make a new one."
            )
        self._next += B
        scores_BV = hash_uniform(0, torch.arange(V)).expand(B, V).clone()
        for row, places in enumerate(asked):
            for rank, place in enumerate(places):
                scores_BV[row, place] = 1.0 + len(places) - rank
        scores_BV = scores_BV.to(tokens.valid_BV.device)
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)


def oracle_plan(task: Task, budget: Budget) -> PruningPlan:
    """The plan of one test of a task.

    Raises:
        ValueError: the task does not know what its questions rest on.
    """
    evidence = task.evidence()
    if evidence is None:
        raise ValueError(f"The task {task.name} does not know what its questions rest on; it has no oracle.")
    oracle = Oracle([places for asked in evidence for places in asked])
    return PruningPlan([Stage(oracle, 0, budget.keep_ratio, budget.keep_tokens)])
