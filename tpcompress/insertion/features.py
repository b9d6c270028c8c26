"""Runs the pruner of a stage on encoder features alone, for runtimes that insert features themselves.

S placeholders (vision tokens and separators), N retained ones, D hidden size, R budget rows, V vision tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tpcompress.families import Layout
from tpcompress.insertion.budget import Budget
from tpcompress.insertion.call import Call
from tpcompress.insertion.shorten.columns import put_tokens
from tpcompress.insertion.shorten.locate import locate
from tpcompress.insertion.shorten.sequence import Frame
from tpcompress.insertion.views.build import build_view
from tpcompress.insertion.views.stage_context import StageContext
from tpcompress.pruners import Pruner


@torch.no_grad()
def prune_features(
    pruner: Pruner, budget: Budget, scope: str, hidden_SD: Tensor, layouts: Sequence[Layout]
) -> tuple[Tensor, Tensor]:
    """Select the tokens that the stage before the language model would retain, as `insertion.stage.run_stage` does.

    Args:
        pruner: one that reads the tokens alone and retains exactly its budget.
        budget: of the stage.
        scope: `image` for one budget per layout, `tile` for one per grid of a layout.
        hidden_SD: features of all placeholders, in the order of the layouts.
        layouts: one per image or video.

    Returns:
        Indices of the retained placeholders, int64 (N,), ascending; and new features of all placeholders (S, D), which
        are the given ones unless the pruner merges.

    Raises:
        ValueError: the layouts do not have as many placeholders as there are features.
    """
    S = len(hidden_SD)
    if sum(layout.placeholders for layout in layouts) != S:
        total = sum(layout.placeholders for layout in layouts)
        raise ValueError(f"The layouts have {total} placeholders, but {S} features are given.")
    device = hidden_SD.device
    places = {"image": torch.ones(1, S, dtype=torch.bool, device=device)}
    rows, frame = locate(places, {"image": layouts}, scope), Frame.full(1, S, device)
    counts = [budget.count(total) for total in rows.total]
    if counts == rows.count and pruner.exact_count:
        return torch.arange(S, device=device), hidden_SD
    call = Call(cast(Any, None), places=places, rows=rows, frame=frame)
    stage = StageContext(cast(Any, None), pruner, call, hidden_SD[None], None, torch.tensor([S - 1], device=device))
    with torch.autocast(device.type, enabled=False):
        selection = pruner(build_view(stage, soft=False), torch.tensor(counts))
    hidden_1SD = hidden_SD[None]
    if selection.vision_BVD is not None:
        hidden_1SD = put_tokens(hidden_1SD, stage.cell_RV, rows.valid_RV, selection.vision_BVD, rows.ragged)
    _, local_1N = frame.cut(rows, selection.keep_BV, counts, hide=False)
    assert local_1N is not None
    return local_1N[0], hidden_1SD[0]
