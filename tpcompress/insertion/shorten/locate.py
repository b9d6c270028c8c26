"""Locates the vision tokens of every image and video in a sequence, one row per budget.

B samples, S positions of the sequence, R budget rows, V vision tokens of a row (padded), T placeholders of a call.
Counts are known on the host, so only `locate` for a batch of several samples, or with tiles to join, syncs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from tpcompress.families import Layout
from tpcompress.insertion.shorten.columns import to_device_async
from tpcompress.insertion.shorten.sequence import BudgetRows


@dataclass(frozen=True)
class _Run:
    """Placeholders of one image, or of its adjacent tiles, in the list of all placeholders of a call."""

    owner: int
    start: int
    layout: Layout


def locate(
    places: Mapping[str, Tensor],
    layouts: Mapping[str, Sequence[Layout]],
    scope: str,
    joins_tiles: bool = False,
    splits_tiles: bool = False,
) -> BudgetRows:
    """Find the vision tokens of every image and video.

    Transformers has checked before that there are as many placeholders as features.

    Args:
        places: by modality, bool (B, S): True where the sequence holds a placeholder.
        layouts: by modality, the layout of each image or video, in their order.
        scope: `image` for one row per image or video, `prompt` for one row per sample.
        joins_tiles: layouts whose placeholders follow each other without a gap are tiles of one image.
        splits_tiles: every rectangle of a layout is an image of its own.
    """
    B, S = next(iter(places.values())).shape
    runs: list[_Run] = []
    found, first = [], 0
    for modality, given in layouts.items():
        listed = [layout for layout in given if layout.count]  # a sample without images may have features of no token
        if splits_tiles:
            listed = [replace(layout, grids=(grid,)) for layout in listed for grid in layout.grids]
        # A stable sort instead of `nonzero`, which syncs: the number of placeholders is known.
        length = sum(layout.placeholders for layout in listed)
        place_T = (~places[modality].reshape(-1)).to(torch.int8).argsort(stable=True)[:length]
        runs += [replace(run, start=run.start + first) for run in _runs(place_T, listed, B, S, joins_tiles)]
        found.append(place_T)
        first += length
    place_T, device = torch.cat(found), found[0].device
    groups = [[run] for run in runs]
    if scope == "prompt":
        groups = [[run for run in runs if run.owner == sample] for sample in dict.fromkeys(run.owner for run in runs)]
    tables = [_table(group) for group in groups]
    total_R = [len(table) for table in tables]
    # One tensor and one copy to the device for everything that the host knows of the tokens.
    table_RV5 = to_device_async(torch.nn.utils.rnn.pad_sequence(tables, batch_first=True), device)
    token_V = torch.arange(max(total_R), device=device)
    count_R1 = to_device_async(torch.tensor(total_R), device)[:, None]
    token_RV = token_V.minimum(count_R1 - 1)
    table_RV5 = table_RV5.gather(1, token_RV[..., None].expand_as(table_RV5))
    index_RV, table_RV4 = place_T[table_RV5[..., 0]] % S, table_RV5[..., 1:]
    if scope == "prompt" and len(layouts) > 1:  # images and videos are listed separately; rows follow the sequence
        order_RV = index_RV.masked_fill(token_V >= count_R1, S).argsort(dim=1, stable=True)
        index_RV, table_RV4 = (
            index_RV.gather(1, order_RV),
            table_RV4.gather(1, order_RV[..., None].expand_as(table_RV4)),
        )
    canvases = [[sum(run.layout.canvas[0] for run in group) for group in groups]]
    canvases.append([max(run.layout.canvas[1] for run in group) for group in groups])
    return BudgetRows(
        owner=[group[0].owner for group in groups],
        total=total_R,
        count=total_R,
        layouts=[tuple(run.layout for run in group) for group in groups],
        owner_R=to_device_async(torch.tensor([group[0].owner for group in groups]), device),
        index_RV=index_RV,
        token_RV=token_RV,
        valid_RV=token_V < count_R1,
        table_RV4=table_RV4,
        canvas=(max(canvases[0]), max(canvases[1])),
    )


def _runs(place_T: Tensor, layouts: Sequence[Layout], B: int, S: int, joins_tiles: bool) -> list[_Run]:
    """The sample of each layout; the host reads positions only if shapes do not determine it (B > 1, tiles to join)."""
    ends = list(accumulate(layout.placeholders for layout in layouts))
    starts = [0, *ends[:-1]]
    joins = joins_tiles and len(layouts) > 1
    edge_2R = [[0] * len(starts)] * 2
    if B > 1 or joins:
        edge_2R = (
            place_T[to_device_async(torch.tensor([starts, [end - 1 for end in ends]]), place_T.device)]
            .cpu()
            .numpy()
            .tolist()
        )
    runs: list[_Run] = []
    previous = -1
    for begin, last, start, layout in zip(*edge_2R, starts, layouts, strict=True):
        if joins and runs and begin == previous + 1 and begin % S:
            whole = replace(layout, grids=runs[-1].layout.grids + layout.grids)
            runs[-1] = replace(runs[-1], layout=whole)
        else:
            runs.append(_Run(begin // S, start, layout))
        previous = last
    return runs


def _table(group: Sequence[_Run]) -> Tensor:
    """(V, 5): place in the list of placeholders, canvas row and column, rectangle, image; images are stacked."""
    parts, top, tiles = [], 0, 0
    for number, run in enumerate(group):
        offset = torch.tensor([run.start, top, 0, tiles])
        table = run.layout.table + offset
        parts.append(torch.cat([table, torch.full((len(table), 1), number)], 1))
        top, tiles = top + run.layout.canvas[0], tiles + len(run.layout.grids)
    return torch.cat(parts)
