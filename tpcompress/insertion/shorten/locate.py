"""Locates the vision tokens of every image and video in a sequence, one row per budget.

B samples, S positions of the sequence, R budget rows, V vision tokens of a row (padded), T placeholders of a call.
Counts are known on the host, so only `locate` for a batch of several samples, or with tiles to group, syncs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from tpcompress.families import Layout, Tiles
from tpcompress.insertion.shorten.columns import to_device_async
from tpcompress.insertion.shorten.sequence import BudgetRows


@dataclass(frozen=True)
class _Run:
    """Placeholders of one image, or of a tile, in the list of all placeholders of a call.

    Attributes:
        owner: sample.
        start: index of the first placeholder in the list.
        layout: its layout.
        joined: it belongs to the same image as the run before it.
    """

    owner: int
    start: int
    layout: Layout
    joined: bool = False


def locate(
    places: Mapping[str, Tensor],
    layouts: Mapping[str, Sequence[Layout]],
    scope: str,
    tiles: Tiles | None = None,
    splits_tiles: bool = False,
    tokens: Tensor | None = None,
) -> BudgetRows:
    """Find the vision tokens of every image and video.

    Transformers has checked before that there are as many placeholders as features.

    Args:
        places: by modality, bool (B, S): True where the sequence holds a placeholder.
        layouts: by modality, the layout of each image or video, in their order.
        scope: `image` for one row per image or video, `tile` for one per tile or frame, `prompt` for one per sample.
        tiles: how tiles of one image are found; None if every layout is an image.
        splits_tiles: every rectangle of a layout is a tile or an image of its own.
        tokens: ids (B, S) or embeddings (B, S, D), which `Tiles.closes` reads.
    """
    B, S = next(iter(places.values())).shape
    runs: list[_Run] = []
    found, first = [], 0
    for modality, given in layouts.items():
        listed = [layout for layout in given if layout.count]  # a sample without images may have features of no token
        same = [False] * len(listed)
        if splits_tiles or scope == "tile":
            same = [i > 0 and not splits_tiles for layout in listed for i in range(len(layout.grids))]
            listed = [piece for layout in listed for piece in layout.pieces]
        # A stable sort instead of `nonzero`, which syncs: the number of placeholders is known.
        length = sum(layout.placeholders for layout in listed)
        place_T = (~places[modality].reshape(-1)).to(torch.int8).argsort(stable=True)[:length]
        for run, joined in zip(_runs(place_T, listed, B, S, tiles, tokens), same, strict=True):
            runs.append(replace(run, start=run.start + first, joined=run.joined or joined))
        found.append(place_T)
        first += length
    place_T, device = torch.cat(found), found[0].device
    groups = _groups(runs, scope)
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
        layouts=[_layouts(group) for group in groups],
        num_images=sum(not run.joined for run in runs),
        owner_R=to_device_async(torch.tensor([group[0].owner for group in groups]), device),
        index_RV=index_RV,
        token_RV=token_RV,
        valid_RV=token_V < count_R1,
        table_RV4=table_RV4,
        canvas=(max(canvases[0]), max(canvases[1])),
    )


def _runs(
    place_T: Tensor, layouts: Sequence[Layout], B: int, S: int, tiles: Tiles | None, tokens: Tensor | None
) -> list[_Run]:
    """The sample of each layout; the host reads positions only where shapes do not determine it (B > 1, tiles)."""
    ends = list(accumulate(layout.placeholders for layout in layouts))
    starts = [0, *ends[:-1]]
    several = tiles is not None and len(layouts) > 1
    if B == 1 and not several:
        return [_Run(0, start, layout) for start, layout in zip(starts, layouts, strict=True)]
    edge_2R = place_T[to_device_async(torch.tensor([starts, [end - 1 for end in ends]]), place_T.device)]
    marks = _marks(edge_2R[0], S, tokens) if several and tiles is not None and tiles.closes else None
    edge_2R, marks_R = edge_2R.cpu().numpy().tolist(), None if marks is None else marks.cpu().numpy().tolist()
    owners = [begin // S for begin in edge_2R[0]]
    runs = [_Run(owner, start, layout) for owner, start, layout in zip(owners, starts, layouts, strict=True)]
    if several:
        last_mark = {} if marks_R is None else dict(zip(owners, marks_R, strict=True))
        for i in range(1, len(runs)):
            if owners[i] != owners[i - 1]:
                continue
            if marks_R is not None:
                joined = marks_R[i - 1] != last_mark[owners[i]]
            else:
                joined = edge_2R[0][i] - edge_2R[1][i - 1] - 1 <= tiles.gap  # type: ignore[union-attr, operator]
            runs[i] = replace(runs[i], joined=joined)
    return runs


def _marks(start_R: Tensor, S: int, tokens: Tensor | None) -> Tensor:
    """A number for the token before each run; equal tokens have equal numbers."""
    assert tokens is not None
    before_R = tokens.reshape(-1, *tokens.shape[2:])[(start_R - 1).clamp(min=0)]
    return before_R if before_R.ndim == 1 else torch.unique(before_R, dim=0, return_inverse=True)[1]


def _groups(runs: Sequence[_Run], scope: str) -> list[list[_Run]]:
    """The runs of each budget row."""
    if scope == "prompt":
        return [[run for run in runs if run.owner == sample] for sample in dict.fromkeys(run.owner for run in runs)]
    groups: list[list[_Run]] = []
    for run in runs:
        if scope == "image" and run.joined:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def _layouts(group: Sequence[_Run]) -> tuple[Layout, ...]:
    """One layout per image of a budget row; the tiles of an image are rectangles of its layout."""
    found: list[Layout] = []
    for run in group:
        if run.joined and found:
            found[-1] = replace(found[-1], grids=found[-1].grids + run.layout.grids)
        else:
            found.append(run.layout)
    return tuple(found)


def _table(group: Sequence[_Run]) -> Tensor:
    """(V, 5): place in the list of placeholders, canvas row and column, rectangle, image; images are stacked."""
    parts: list[Tensor] = []
    top, tiles, image = 0, 0, -1
    for run in group:
        image += not (run.joined and parts)
        offset = torch.tensor([run.start, top, 0, tiles])
        table = run.layout.table + offset
        parts.append(torch.cat([table, torch.full((len(table), 1), image)], 1))
        top, tiles = top + run.layout.canvas[0], tiles + len(run.layout.grids)
    return torch.cat(parts)
