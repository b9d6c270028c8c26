"""Nested choices: a pass with larger budgets retains whatever an earlier pass of the same batch did.

A teacher on more tokens can then say something of every token that its student sees.

R budget rows, V vision tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.shorten.sequence import Rows
from tpcompress.insertion.trace import StageTrace
from tpcompress.pruners import Selection
from tpcompress.pruners.topk import keep_topk, rank


def check_nestable(plan: PruningPlan) -> None:
    """See that tokens can be added to the choices of a plan's pruners.

    Raises:
        ValueError: one of them gives new values, sizes or places to what it chose, or counts for itself.
    """
    for stage in plan.stages:
        if stage.pruner.merges or stage.pruner.uses_token_sizes or not stage.pruner.exact_count:
            what = "counts for itself" if not stage.pruner.exact_count else "changes the tokens that it retains"
            raise ValueError(
                f"Pruner '{stage.pruner.name}' {what}, so nothing can be put into its choice; leave `including` out, "
                f"or use an exact pruner that only selects."
            )


def widened(
    earlier: Mapping[int, StageTrace], number: int, rows: Rows, selection: Selection, counts: list[int]
) -> Selection:
    """A stage's choice with everything in it that the same stage of an earlier call retained.

    What was retained there comes first, then what the pruner would retain by itself, then the rest; each by score. So a
    choice that is nested already does not change.

    Args:
        earlier: the stages of the earlier call, by number.
        number: the stage.
        rows: the vision tokens that reach it now.
        selection: what its pruner says.
        counts: how many each row keeps.

    Raises:
        ValueError: the earlier call had another batch, more tokens than the budget, or the pruner gave gates.
    """
    before = earlier.get(number)
    if before is None or before.total != rows.total or before.owner != rows.owner:
        raise ValueError(f"Stage {number} has no choice of an earlier call of this batch to include; record that call.")
    if any(old > new for old, new in zip(before.vision_out, counts, strict=True)):
        raise ValueError(
            f"Stage {number} keeps {counts} vision tokens, but is to include {before.vision_out}; give it larger "
            f"budgets than the earlier call had."
        )
    if selection.gate_BV is not None:
        raise ValueError("A pruner in training gates its choice, so none can be put into it; call model.eval() first.")
    forced_RV = before.retained_RV.gather(1, rows.token_RV)
    place_RV = rank(selection.scores_BV, rows.valid_RV)
    V = place_RV.shape[1]
    order_RV = 2 * V * forced_RV.long() + V * selection.keep_BV.long() - place_RV
    return replace(selection, keep_BV=keep_topk(order_RV.float(), rows.valid_RV, torch.tensor(counts)))
