"""Forced retention: a pass with larger budgets retains every token that an earlier pass of the same batch retained.

A teacher on more tokens then has an output for every token of its student.

R budget rows, V vision tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.shorten.sequence import BudgetRows
from tpcompress.insertion.trace import StageTrace
from tpcompress.pruners import Selection
from tpcompress.pruners.topk import keep_topk, rank


def check_nestable(plan: PruningPlan) -> None:
    """Check that tokens can be added to the selections of a plan's pruners.

    Raises:
        ValueError: a pruner returns new values, sizes or places for what it retains, or has a variable budget.
    """
    for stage in plan.stages:
        if stage.pruner.merges or stage.pruner.uses_token_sizes or not stage.pruner.exact_count:
            what = "chooses its own count" if not stage.pruner.exact_count else "changes the tokens that it retains"
            raise ValueError(
                f"Pruner '{stage.pruner.name}' {what}, so nothing can be added to its selection; leave `force_retain` "
                f"out, or use a pruner with an exact count that only selects."
            )


def add_retained(
    earlier: Mapping[int, StageTrace], number: int, rows: BudgetRows, selection: Selection, counts: list[int]
) -> Selection:
    """A stage's selection, with every token that the same stage of an earlier call retained.

    The earlier call's tokens come first, then the pruner's own choice, then the rest; each by score. A selection that
    already contains the earlier one stays as it is.

    Args:
        earlier: stages of the earlier call by number.
        number: index of the stage.
        rows: vision tokens that reach the stage now.
        selection: the pruner's own.
        counts: number of tokens that each row keeps.

    Raises:
        ValueError: the earlier call had another batch or more tokens than the budget, or the pruner returned gates.
    """
    before = earlier.get(number)
    if before is None or before.total != rows.total or before.owner != rows.owner:
        raise ValueError(f"Stage {number} has no selection of an earlier call of this batch; record that call.")
    if any(old > new for old, new in zip(before.vision_out, counts, strict=True)):
        raise ValueError(
            f"Stage {number} keeps {counts} vision tokens, but must retain {before.vision_out}; give it larger budgets "
            f"than the earlier call had."
        )
    if selection.gate_BV is not None:
        raise ValueError(
            "A pruner in training gates its selection, to which nothing can be added; call model.eval() first."
        )
    forced_RV = before.retained_RV.gather(1, rows.token_RV)
    place_RV = rank(selection.scores_BV, rows.valid_RV)
    V = place_RV.shape[1]
    order_RV = 2 * V * forced_RV.long() + V * selection.keep_BV.long() - place_RV
    return replace(selection, keep_BV=keep_topk(order_RV.float(), rows.valid_RV, torch.tensor(counts)))
