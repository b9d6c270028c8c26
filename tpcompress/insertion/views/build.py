"""Builds the `TokenView` of a stage: only what its pruner `needs`, and nothing twice.

B samples, N columns, R budget rows, V vision tokens, H query heads, Q queries, L layers of the vision tower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.families import Parts
from tpcompress.insertion.call import Call
from tpcompress.insertion.layer_probe import LayerProbe
from tpcompress.insertion.shorten.columns import get_tokens, to_device_async
from tpcompress.insertion.shorten.sequence import BudgetRows, Frame
from tpcompress.pruners import Pruner, TokenView
from tpcompress.pruners.base import (
    BEFORE_VIEWS,
    BETWEEN,
    INSTRUCTION,
    LOOSE_VIEWS,
    SYSTEM,
    TOWER_FIELDS,
    TOWER_VIEWS,
)


def build_view(
    parts: Parts,
    pruner: Pruner,
    call: Call,
    hidden_BND: Tensor,
    padding_BN: Tensor | None,
    last_prompt_B: Tensor,
    soft: bool,
) -> tuple[TokenView, Tensor]:
    """What a pruner may look at, and the flat columns (R, V) of the tokens that it judges.

    Args:
        parts: of the model.
        pruner: its `needs` decide what is built.
        call: the prefill under way.
        hidden_BND: hidden states at the stage.
        padding_BN: True on real columns; None if all are.
        last_prompt_B: column of the last prompt token of each sample: nothing after it is ever shown.
        soft: see `TokenView.soft`.

    Raises:
        ValueError: the pruner needs views of the vision tower, and these features came without.
    """
    rows, frame, needs = call.rows, call.frame, pruner.needs
    assert rows is not None and frame is not None
    cell_RV = frame.cells(rows)
    column_RV = cell_RV - rows.owner_R[:, None] * frame.width
    optional: dict[str, Any] = {}
    if "normed" in needs:
        with torch.no_grad():
            normed_BND = parts.final_norm(hidden_BND)
        optional["normed_BVD"] = get_tokens(normed_BND, cell_RV)
        optional["text_normed_BSD"] = normed_BND[rows.owner_R]
    if needs & {"text", "attention_prompt", "input"}:
        text_BN = _prompt_text(call, frame, padding_BN, last_prompt_B)
        role_RN = _roles(rows, column_RV, text_BN)
        if "text" in needs:
            optional["text_BSD"], optional["text_role_BS"] = hidden_BND[rows.owner_R], role_RN
            optional["column_BV"] = column_RV
            instruction_RN = role_RN == INSTRUCTION
            optional["text_valid_BS"] = torch.where(instruction_RN.any(1, keepdim=True), instruction_RN, role_RN > 0)
        if needs & {"attention_prompt", "input"}:
            query_BQ = _words(rows, frame, text_BN)
            optional["prompt_column_BQ"] = query_BQ[rows.owner_R]
            optional["prompt_role_BQ"] = role_RQ = role_RN.gather(1, query_BQ[rows.owner_R])
    with torch.no_grad():
        if "input" in needs:
            optional |= _at_input(call, rows, frame, hidden_BND, query_BQ)
        if "attention_next" in needs:
            ahead = call.ahead
            assert ahead is not None
            held = 0 if call.prefix is None else call.prefix.held(ahead.index)
            weight_BHQN = ahead.attention(last_prompt_B[:, None], held)
            optional["attention_next_BHV"] = _to_tokens(weight_BHQN[rows.owner_R], column_RV)[:, :, 0]
        if needs & BEFORE_VIEWS:
            before = call.before
            assert before is not None
            held = 0 if call.prefix is None else call.prefix.held(before.index)
            if "keys" in needs:
                key_BNd = before.keys().transpose(1, 2).flatten(2)
                optional["keys_BVD"], optional["text_keys_BSD"] = get_tokens(key_BNd, cell_RV), key_BNd[rows.owner_R]
            if "values" in needs:
                value_BNd = before.values().transpose(1, 2).flatten(2)
                optional["values_BVD"], optional["text_values_BSD"] = (
                    get_tokens(value_BNd, cell_RV),
                    value_BNd[rows.owner_R],
                )
            if "attention" in needs:
                weight_BHQN = before.attention(last_prompt_B[:, None], held)
                optional["attention_BHV"] = _to_tokens(weight_BHQN[rows.owner_R], column_RV)[:, :, 0]
            if "attention_prompt" in needs:
                weight_RHQV = _to_tokens(before.attention(query_BQ, held)[rows.owner_R], column_RV)
                # There may be more queries than words: rows of an answer must not be seen.
                no_word_R1Q1 = (role_RQ == 0)[:, None, :, None]
                optional["attention_prompt_BHQV"] = weight_RHQV.masked_fill(no_word_R1Q1, 0.0)
            if "attention_last_vision" in needs:
                optional["attention_last_vision_BHV"] = _last_vision_row(before, rows, column_RV, held)
        for word in sorted(needs & (TOWER_VIEWS - LOOSE_VIEWS)):
            per_layer = [_from_tower(call, rows, word, layer) for layer in pruner.tower_layers]
            optional[TOWER_FIELDS[word]] = torch.stack(per_layer, 1)
    if "pixels" in needs:
        optional["pixels_BVC"] = _from_tower(call, rows, "pixels", 0)
        assert parts.family.tower is not None
        optional["pixel_images"] = parts.family.tower.images(parts.model.config)
    if "projector" in needs:
        optional["projector_BVC"], optional["project"] = _from_tower(call, rows, "projector", 0), parts.projector
    table_RV4 = rows.table_RV4
    view = TokenView(
        vision_BVD=get_tokens(hidden_BND, cell_RV),
        valid_BV=rows.valid_RV,
        row_BV=table_RV4[..., 0],
        col_BV=table_RV4[..., 1],
        tile_BV=table_RV4[..., 2],
        image_BV=table_RV4[..., 3],
        canvas=rows.canvas,
        soft=soft,
        video_BV=_of_videos(rows, table_RV4[..., 3]),
        **optional,
    )
    return view, cell_RV


def _of_videos(rows: BudgetRows, image_RV: Tensor) -> Tensor:
    """bool (R, V): tokens of videos; which of a row's pictures are some, the host knows."""
    pictures = max(map(len, rows.layouts))
    flags = [[layout.video for layout in row] + [False] * (pictures - len(row)) for row in rows.layouts]
    return to_device_async(torch.tensor(flags), image_RV.device).gather(1, image_RV)


def _prompt_text(call: Call, frame: Frame, padding_BN: Tensor | None, last_prompt_B: Tensor) -> Tensor:
    """bool (B, N): words of the prompt: no padding, vision token, separator or answer."""
    place_BS = torch.stack(list(call.places.values())).any(0)
    text_BN = ~place_BS.gather(1, frame.index_BN)
    text_BN &= torch.arange(frame.width, device=text_BN.device) <= last_prompt_B[:, None]
    return text_BN if padding_BN is None else text_BN & padding_BN


def _roles(rows: BudgetRows, column_RV: Tensor, text_BN: Tensor) -> Tensor:
    """int8 (R, N): where each word of the prompt stands relative to the row's vision tokens; 0 on everything else."""
    N = text_BN.shape[1]
    column_N = torch.arange(N, device=text_BN.device)
    first_R1 = column_RV.masked_fill(~rows.valid_RV, N).amin(1, keepdim=True)
    role_RN = torch.where(column_N < first_R1, SYSTEM, BETWEEN)
    role_RN = torch.where(column_N > _last_column(rows, column_RV)[:, None], INSTRUCTION, role_RN)
    return role_RN.masked_fill(~text_BN[rows.owner_R], 0).to(torch.int8)


def _last_column(rows: BudgetRows, column_RV: Tensor) -> Tensor:
    """Column (R,) of each row's last vision token."""
    return column_RV.masked_fill(~rows.valid_RV, -1).amax(1)


def _to_tokens(weight_RHQN: Tensor, column_RV: Tensor) -> Tensor:
    """The columns of each row's vision tokens, (R, H, Q, V)."""
    R, H, Q, _ = weight_RHQN.shape
    return weight_RHQN.gather(3, column_RV[:, None, None].expand(R, H, Q, -1))


def _words(rows: BudgetRows, frame: Frame, text_BN: Tensor) -> Tensor:
    """Columns (B, Q) of the words of the prompt, in order; others follow where a sample has fewer.

    Q is what is left of the longest sample without its placeholders, which the host knows: answers count, too.
    """
    words = {owner: frame.lengths[owner] for owner in rows.owner}
    for owner, count, layouts in zip(rows.owner, rows.count, rows.layouts, strict=True):
        words[owner] -= count + sum(layout.placeholders - layout.count for layout in layouts)
    return (~text_BN).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, *words.values())]


def _at_input(call: Call, rows: BudgetRows, frame: Frame, hidden_BND: Tensor, query_BQ: Tensor) -> dict[str, Tensor]:
    """Vision tokens and words at the language model's input; no stage drops a word."""
    rows, entry, input_BND = call.entry or (rows, frame.as_input(), hidden_BND)
    place_RQ = frame.base_BN.gather(1, query_BQ)[rows.owner_R] if call.entry else query_BQ[rows.owner_R]
    index_RQD = place_RQ[..., None].expand(-1, -1, input_BND.shape[-1])
    return {
        "input_vision_BUD": get_tokens(input_BND, entry.cells(rows)),
        "input_valid_BU": rows.valid_RV,
        "input_prompt_BQD": input_BND[rows.owner_R].gather(1, index_RQD),
    }


def _last_vision_row(before: LayerProbe, rows: BudgetRows, column_RV: Tensor, held: int) -> Tensor:
    """Attention (R, H, V) of each row's last vision token to all of them."""
    slots = [rows.owner[:r].count(owner) for r, owner in enumerate(rows.owner)]
    slot_R = to_device_async(torch.tensor(slots), column_RV.device)
    query_BQ = column_RV.new_zeros(len(before.hidden_BND), max(slots) + 1)
    query_BQ = query_BQ.index_put((rows.owner_R, slot_R), _last_column(rows, column_RV))
    weight_RHN = before.attention(query_BQ, held)[rows.owner_R, :, slot_R]
    return _to_tokens(weight_RHN[:, :, None], column_RV)[:, :, 0]


def _from_tower(call: Call, rows: BudgetRows, word: str, layer: int) -> Tensor:
    """One view of one layer of the tower, with the vision tokens in the dimension before the last (R, ..., V, D).

    Features fill the placeholders of their modality in the order of the flattened batch.
    """
    flat, place, first = [], None, 0
    for modality, note in call.encoded.items():
        if (word, layer) not in note.tower:
            raise ValueError(
                f"The {modality} features of this call came without {word}: they were encoded in mode off, by another "
                f"tower, or pooled before the projector; encode them again, or use a pruner that does not need it."
            )
        values = note.tower[word, layer]
        here_BS = call.places[modality]
        rank_BS = (here_BS.reshape(-1).cumsum(0) - 1 + first).view(here_BS.shape)
        place = rank_BS if place is None else torch.where(here_BS, rank_BS, place)
        flat += values
        first += sum(len(value) for value in values)
    assert place is not None
    found_RV = place[rows.owner_R[:, None], rows.index_RV]
    value_RVx = torch.cat(flat)[found_RV]
    return value_RVx.movedim(1, -1) if word in ("tower_cls", "tower_received") else value_RVx.movedim(1, -2)
