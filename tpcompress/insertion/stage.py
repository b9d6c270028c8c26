"""One stage of a prefill: look, let the pruner choose, cut, and write it down.

B samples, N columns, R budget rows, V vision tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpcompress.insertion.call import Call
from tpcompress.insertion.gates import check_gated, hand_down
from tpcompress.insertion.nested import widened
from tpcompress.insertion.plan import check_budget
from tpcompress.insertion.shorten.columns import put_tokens, take
from tpcompress.insertion.shorten.masks import RECURRENT, layer_kind
from tpcompress.insertion.trace import StageTrace
from tpcompress.insertion.views.build import build_view
from tpcompress.pruners import Selection, TokenView

if TYPE_CHECKING:
    from tpcompress.insertion.hooks import Controller


def run_stage(
    controller: Controller, number: int, hidden_BND: Tensor, call: Call
) -> tuple[Tensor, Tensor | None, bool]:
    """Run one stage and bring the call up to date.

    Args:
        controller: whose plan, pruners, budgets and mode count.
        number: index of the stage in the plan.
        hidden_BND: hidden states that reach the stage.
        call: the prefill under way.

    Returns:
        Hidden states after the stage; the old column of each new one, or None if columns stay; whether anything
        changed. A budget that keeps everything does not ask the pruner, so that the model is the base bit for bit;
        unless the pruner counts for itself. Without a token left, nobody is asked.

    Raises:
        ValueError: the budget does not fit the pruner, mode `mask` cannot hide from a layer, or nothing is left.
    """
    rows, frame = call.rows, call.frame
    assert rows is not None and frame is not None and call.last_prompt_B is not None
    pruner: Any = controller.pruners[number]
    check_budget(pruner, controller.budgets[number])
    counts = [min(controller.budgets[number].count(t), c) for t, c in zip(rows.total, rows.count, strict=True)]
    if not any(rows.count) or (pruner.exact_count and counts == rows.count):
        _note(controller, number, call, rows.count, frame.width, None, None)
        return hidden_BND, None, False
    hide = controller.mode == "mask"
    view, cell_RV, selection, counts = _ask(controller, pruner, call, hidden_BND, counts)
    if controller.included is not None:
        selection = widened(controller.included, number, rows, selection, counts)
    if selection.vision_BVD is not None:
        hidden_BND = put_tokens(hidden_BND, cell_RV, rows.valid_RV, selection.vision_BVD, rows.ragged)
    # Compact positions follow the order alone.
    place_RV = selection.place_BV if controller.plan.positions == "original" else None
    moved = selection.size_BV is not None or place_RV is not None
    if moved and not pruner.uses_token_sizes:
        raise ValueError(
            f"Pruner '{pruner.name}' gives sizes or places; set its class attribute uses_token_sizes = True."
        )
    gates = (selection.value_gate_BV, selection.key_bias_BV)
    check_gated(pruner, gates, call.prefix is not None)
    frame = call.frame = frame.gated(rows, *gates)
    smooth = view.soft and selection.gate_BV is not None
    local_BN, cut = None, not smooth and (counts != rows.count or moved)
    if cut:
        if hide:
            _check_hiding(controller, number, frame.width)
        call.frame, local_BN = frame.calibrated(rows, selection.size_BV, place_RV).cut(
            rows, selection.keep_BV, counts, hide
        )
        call.rows = rows.retain(selection.keep_BV, counts)
        if local_BN is not None:
            hidden_BND = take(hidden_BND, local_BN, 1)
    behind = controller.parts.layers[controller.layers[number]]
    hidden_BND, call.gates = hand_down(hidden_BND, call.frame.value_gate_BN, call.frame.key_bias_BN, behind)
    _note(controller, number, call, rows.count, frame.width, view, selection)
    return hidden_BND, local_BN, cut


def _ask(
    controller: Controller, pruner: Any, call: Call, hidden_BND: Tensor, counts: list[int]
) -> tuple[TokenView, Tensor, Selection, list[int]]:
    """The view of a stage, the flat columns (R, V) of its tokens, the pruner's answer, and how many each row keeps.

    `counts` says how many each row should keep. A pruner that is not exact counts for itself, which the host must read.
    """
    rows, frame = call.rows, call.frame
    assert rows is not None and frame is not None and call.last_prompt_B is not None
    padding_BN = frame.padding(call.mask_BS)
    last_B = frame.column_of(call.last_prompt_B[:, None])[:, 0]
    shown, entry = rows.stood_in(), call.entry
    if shown is not rows:
        counts = [count if came else 1 for count, came in zip(counts, rows.count, strict=True)]
        entry = None if entry is None else (entry[0].stood_in(), *entry[1:])
    looked_at = call if shown is rows else replace(call, rows=shown, entry=entry)
    soft = controller.mode == "mask"
    view, cell_RV = build_view(controller.parts, pruner, looked_at, hidden_BND, padding_BN, last_B, soft=soft)
    call.before = call.behind = None  # they hold the queries and keys of a whole layer
    # Out of mixed precision: the choice must be the one that the exported model makes.
    with torch.autocast(hidden_BND.device.type, enabled=False):
        selection = pruner(view, torch.tensor(counts))
    if shown is not rows or not pruner.exact_count:
        selection = replace(selection, keep_BV=selection.keep_BV & rows.valid_RV)
    if not pruner.exact_count:
        counts = selection.keep_BV.sum(1).cpu().numpy().tolist()
    elif shown is not rows:
        counts = [min(count, came) for count, came in zip(counts, rows.count, strict=True)]
    return view, cell_RV, selection, counts


def _check_hiding(controller: Controller, number: int, width: int) -> None:
    """Mode `mask` must equal mode `drop`: refuse layers whose state or window would count hidden columns.

    Raises:
        ValueError: such a layer stands behind the stage.
    """
    config, first = controller.parts.text_config, controller.layers[number]
    kinds = {layer_kind(config, layer) for layer in range(first, len(controller.parts.layers))}
    what = next((kind for kind in RECURRENT if kind in kinds), None)
    if "sliding_attention" in kinds and width > config.sliding_window:
        what = f"sliding_attention (a window of {config.sliding_window} over {width} columns)"
    if what:
        raise ValueError(
            f"Mode mask cannot hide tokens from layers of kind {what}; use mode drop, or train a learned pruner, whose "
            f"gates hide nothing."
        )


def _note(
    controller: Controller,
    number: int,
    call: Call,
    came: list[int],
    width: int,
    view: TokenView | None,
    selection: Selection | None,
) -> None:
    """Write the stage into every open record."""
    assert call.rows is not None and call.frame is not None
    for trace in controller.traces:
        trace.stages.append(
            StageTrace(
                stage=number,
                layer=controller.layers[number],
                total=call.rows.total,
                vision_in=came,
                vision_out=call.rows.count,
                sequence_in=width,
                sequence_out=call.frame.width,
                retained_RV=call.rows.retained_RV(),
                owner=call.rows.owner,
                layouts=call.rows.layouts,
                view=view,
                selection=selection,
            )
        )
