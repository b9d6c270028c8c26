"""One stage of a prefill: builds the pruner's view, runs the pruner, cuts the sequence, and records it.

B samples, N columns, R budget rows, V vision tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tpcompress.insertion.attachment import Attachment, requires_grad
from tpcompress.insertion.budget import check_budget
from tpcompress.insertion.call import Call
from tpcompress.insertion.gates import check_gated, route_gates
from tpcompress.insertion.nested import add_retained
from tpcompress.insertion.settings import Settings
from tpcompress.insertion.shorten.columns import put_tokens, take
from tpcompress.insertion.shorten.masks import RECURRENT, layer_kind
from tpcompress.insertion.trace import StageTrace
from tpcompress.insertion.views.build import build_view
from tpcompress.insertion.views.stage_context import StageContext
from tpcompress.pruners import Selection, TokenView


def run_stage(
    attachment: Attachment, number: int, hidden_BND: Tensor, call: Call
) -> tuple[Tensor, Tensor | None, bool]:
    """Run one stage and update the call.

    A budget that keeps everything skips the pruner, so that the model is the base bit for bit, unless the pruner has a
    variable budget. Without a vision token left the pruner is skipped, too.

    Args:
        attachment: of the model.
        number: index of the stage in the plan.
        hidden_BND: hidden states at the stage.
        call: the prefill under way.

    Returns:
        Hidden states after the stage; the old column of each new one, or None if columns stay; whether anything
        changed.

    Raises:
        ValueError: the budget does not fit the pruner, mode `mask` cannot hide tokens from a layer, or no column is
            left.
    """
    rows, frame, settings = call.rows, call.frame, call.settings
    assert rows is not None and frame is not None and call.last_prompt_B is not None
    pruner: Any = attachment.pruners[number]
    budget = settings.budgets[number]
    check_budget(pruner, budget)
    counts = [min(budget.count(t), c) for t, c in zip(rows.total, rows.count, strict=True)]
    if not any(rows.count) or (pruner.exact_count and counts == rows.count):
        _record(number, call, rows.count, frame.width, None, None)
        return hidden_BND, None, False
    hide = settings.mode == "mask"
    view, cell_RV, selection, counts = _select(attachment, pruner, call, hidden_BND, counts)
    _check_learning(attachment, pruner, settings, selection)
    if settings.retained is not None:
        selection = add_retained(settings.retained, number, rows, selection, counts)
    if selection.vision_BVD is not None:
        hidden_BND = put_tokens(hidden_BND, cell_RV, rows.valid_RV, selection.vision_BVD, rows.ragged)
    # Compact positions depend on the order alone.
    place_RV = selection.place_BV if attachment.plan.positions == "original" else None
    moved = selection.size_BV is not None or place_RV is not None
    if moved and not pruner.uses_token_sizes:
        raise ValueError(
            f"Pruner '{pruner.name}' returns sizes or places; set its class attribute uses_token_sizes = True."
        )
    gates = (selection.value_gate_BV, selection.key_bias_BV)
    check_gated(pruner, gates, call.prefix is not None)
    frame = call.frame = frame.gated(rows, *gates)
    soft_masked = view.soft and selection.gate_BV is not None
    local_BN, cut = None, moved or (not soft_masked and counts != rows.count)
    if soft_masked:
        call.frame = frame.calibrated(rows, selection.size_BV, place_RV)
    elif cut:
        if hide:
            _check_hiding(attachment, settings.layers[number], frame.width)
        call.frame, local_BN = frame.calibrated(rows, selection.size_BV, place_RV).cut(
            rows, selection.keep_BV, counts, hide
        )
        call.rows = rows.retain(selection.keep_BV, counts)
        if local_BN is not None:
            hidden_BND = take(hidden_BND, local_BN, 1)
    layer = attachment.parts.layers[settings.layers[number]]
    hidden_BND, call.gates = route_gates(hidden_BND, call.frame.value_gate_BN, call.frame.key_bias_BN, layer)
    _record(number, call, rows.count, frame.width, view, selection)
    return hidden_BND, local_BN, cut


def _select(
    attachment: Attachment, pruner: Any, call: Call, hidden_BND: Tensor, counts: list[int]
) -> tuple[TokenView, Tensor, Selection, list[int]]:
    """Run the pruner.

    Args:
        attachment: of the model.
        pruner: of the stage.
        call: the prefill under way.
        hidden_BND: hidden states at the stage.
        counts: number of tokens that each row should keep. A pruner with a variable budget chooses its own, and reading
            it costs one host-device sync.

    Returns:
        The pruner's view, the flat columns (R, V) of its tokens, its selection, and how many each row keeps.
    """
    rows, frame = call.rows, call.frame
    assert rows is not None and frame is not None and call.last_prompt_B is not None
    padding_BN = frame.padding(call.mask_BS)
    last_B = frame.column_of(call.last_prompt_B[:, None])[:, 0]
    shown, entry = rows.with_dummies(), call.entry
    if shown is not rows:
        counts = [count if came else 1 for count, came in zip(counts, rows.count, strict=True)]
        entry = None if entry is None else (entry[0].with_dummies(), *entry[1:])
    viewed = call if shown is rows else replace(call, rows=shown, entry=entry)
    soft = call.settings.mode == "mask"
    stage = StageContext(attachment.parts, pruner, viewed, hidden_BND, padding_BN, last_B)
    view = build_view(stage, soft)
    call.before = call.ahead = None  # they hold the queries and keys of a whole layer
    # Outside of autocast: the exported model must make the same choice. A frozen pruner selects as in the export.
    frozen = pruner.learned and pruner.training and not requires_grad(pruner)
    with torch.autocast(hidden_BND.device.type, enabled=False), _evaluating(pruner, frozen):
        selection = pruner(view, torch.tensor(counts))
    if shown is not rows or not pruner.exact_count:
        selection = replace(selection, keep_BV=selection.keep_BV & rows.valid_RV)
    if not pruner.exact_count:
        counts = selection.keep_BV.sum(1).cpu().numpy().tolist()
    elif shown is not rows:
        counts = [min(count, came) for count, came in zip(counts, rows.count, strict=True)]
    return view, stage.cell_RV, selection, counts


@contextmanager
def _evaluating(pruner: nn.Module, active: bool) -> Iterator[None]:
    """Run a block with a pruner in eval mode, if `active`."""
    if active:
        pruner.eval()
    try:
        yield
    finally:
        if active:
            pruner.train()


def _check_learning(attachment: Attachment, pruner: Any, settings: Settings, selection: Selection) -> None:
    """Warn once if a pruner is to be trained, but no gradient of the model reaches it."""
    if settings.mode != "drop" or settings.mode_chosen or not (torch.is_grad_enabled() and pruner.training):
        return
    carriers = (selection.vision_BVD, selection.value_gate_BV, selection.key_bias_BV)
    if pruner.learned and requires_grad(pruner) and not any(x is not None and x.requires_grad for x in carriers):
        attachment.warn_once(
            f"Pruner '{pruner.name}' has weights that require a gradient, but none reaches them when the sequence is "
            f"cut, so they are not trained; call tpcompress.trainable(model) before training."
        )


def _check_hiding(attachment: Attachment, layer: int, width: int) -> None:
    """Check that mode `mask` equals mode `drop` in all layers after a stage.

    Raises:
        ValueError: a layer has a state or a window that would count hidden columns.
    """
    config = attachment.parts.text_config
    kinds = {layer_kind(config, index) for index in range(layer, len(attachment.parts.layers))}
    what = next((kind for kind in RECURRENT if kind in kinds), None)
    if "sliding_attention" in kinds and width > config.sliding_window:
        what = f"sliding_attention (a window of {config.sliding_window} over {width} columns)"
    if what:
        raise ValueError(
            f"Mode mask cannot hide tokens from layers of kind {what}; use mode drop, or train a learned pruner, whose "
            f"gates hide nothing."
        )


def _record(
    number: int, call: Call, vision_in: list[int], width: int, view: TokenView | None, selection: Selection | None
) -> None:
    """Add the stage to every open record."""
    assert call.rows is not None and call.frame is not None
    for trace in call.settings.traces:
        trace.stages.append(
            StageTrace(
                stage=number,
                layer=call.settings.layers[number],
                total=call.rows.total,
                vision_in=vision_in,
                vision_out=call.rows.count,
                sequence_in=width,
                sequence_out=call.frame.width,
                retained_RV=call.rows.retained_RV(),
                owner=call.rows.owner,
                layouts=call.rows.layouts,
                num_images=call.rows.num_images,
                view=view,
                selection=selection,
            )
        )
