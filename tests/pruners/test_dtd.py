"""DTD against a loop over the cells of each frame, on plain views and in tiny models that take videos."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import batch, make_view, pad_view, tiny_model, view_rows
from torch import Tensor

from tpcompress.families import Layout, resolve
from tpcompress.families.layout import Grid
from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.views.available import why_unavailable
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.dtd import cell_before, change

D = 16
SHAPES = [(4, 3, 5), (3, 1, 7), (5, 2, 2), (2, 1, 1), (1, 3, 4), (7, 1, 1)]
"""(frames, rows, columns)."""


def clip(B: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Frames that repeat each other more or less."""
    frames, rows, cols = shape
    g = torch.Generator().manual_seed(seed)
    still, moves = torch.randn(B, 1, rows * cols, D, generator=g), torch.randn(B, frames, rows * cols, D, generator=g)
    return (still + torch.rand(B, frames, rows * cols, 1, generator=g) * moves).flatten(1, 2)


def video_view(x: Tensor, shape: tuple[int, int, int], **views: Any) -> TokenView:
    frames, rows, cols = shape
    tile = torch.arange(frames).repeat_interleave(rows * cols).expand(len(x), -1)
    return TokenView.of(x, (frames * rows, cols), tile_BV=tile, **views)


def difference(a: Tensor, b: Tensor, level: str) -> float:
    a, b = a.double(), b.double()
    return float(1 - a @ b / (a.norm() * b.norm()) if level == "feature" else (a - b).abs().mean())


def naive_changes(x: Tensor, cells: list[tuple[int, ...]], level: str = "feature") -> list[float | None]:
    """cells: (image, frame, row in the frame, column) of each token; None where there is no cell to compare with."""
    where = {cell: v for v, cell in enumerate(cells)}
    before = [where.get((image, frame - 1, row, col)) for image, frame, row, col in cells]
    return [None if u is None else difference(x[v], x[u], level) for v, u in enumerate(before)]


def naive_keep(changes: list[float | None], budget: int) -> set[int]:
    return set(sorted(range(len(changes)), key=lambda v: (changes[v] is not None, -(changes[v] or 0.0), v))[:budget])


def cells_of(shape: tuple[int, int, int]) -> list[tuple[int, ...]]:
    frames, rows, cols = shape
    return [(0, f, r, c) for f in range(frames) for r in range(rows) for c in range(cols)]


def chosen(keep: Tensor) -> set[int]:
    return set(keep.nonzero().flatten().tolist())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", ["feature", "pixel"])
def test_every_budget_keeps_what_changed_most(shape: tuple[int, int, int], level: str) -> None:
    x = clip(1, shape)
    V = x.shape[1]
    pixels = torch.randn(1, V, 12, generator=torch.Generator().manual_seed(1))
    view = view_rows(video_view(x, shape, pixels_BVC=pixels), [0] * V)
    selection = create({"type": "dtd", "level": level})(view, torch.arange(1, V + 1))
    changes = naive_changes(x[0] if level == "feature" else pixels[0], cells_of(shape), level)
    for b in range(V):
        assert chosen(selection.keep_BV[b]) == naive_keep(changes, b + 1)
    first = shape[1] * shape[2]
    for v, value in enumerate(changes):
        assert (value is None) == (v < first)
        assert value is None or selection.scores_BV[0, v].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("level", "threshold"), [("feature", 0.5), ("feature", 0.9), ("pixel", 0.4), ("pixel", 0.0)])
def test_a_threshold_keeps_all_that_pass(shape: tuple[int, int, int], level: str, threshold: float) -> None:
    x = clip(2, shape)
    pruner = create({"type": "dtd", "level": level, "threshold": threshold})
    assert not pruner.exact_count
    view = video_view(x, shape, pixels_BVC=x)
    keep = pruner(view, torch.tensor([1, 2])).keep_BV
    for b in range(2):
        changes = naive_changes(x[b], cells_of(shape), level)
        least = 1 - threshold if level == "feature" else threshold
        assert chosen(keep[b]) == {v for v, value in enumerate(changes) if value is None or value >= least}
        assert keep[b, : shape[1] * shape[2]].all(), "the first frame stays"


def test_a_still_video_leaves_its_first_frame() -> None:
    x = clip(1, (1, 2, 3)).repeat(1, 4, 1)
    assert create({"type": "dtd", "threshold": 0.99})(video_view(x, (4, 2, 3)), torch.tensor([20])).keep_BV.sum() == 6
    keep = create("dtd")(video_view(x, (4, 2, 3)), torch.tensor([8])).keep_BV
    assert keep[0, :8].all(), "what stands still ties, and ties go to the earlier token"
    assert keep.sum() == 8
    assert create({"type": "dtd", "threshold": 1.0})(video_view(x, (4, 2, 3)), torch.tensor([8])).keep_BV.all()


def test_an_image_has_no_frame_before_it() -> None:
    view = make_view(create("dtd"), clip(2, (1, 3, 4)), (3, 4))
    selection = create("dtd")(view, torch.tensor([5, 12]))
    assert selection.keep_BV[0].tolist() == [True] * 5 + [False] * 7
    assert len(selection.scores_BV.unique()) == 1
    assert create({"type": "dtd", "threshold": 0.5})(view, torch.tensor([5, 5])).keep_BV.all()


@pytest.mark.parametrize("level", ["feature", "pixel"])
def test_padding_and_partners_change_nothing(level: str) -> None:
    shape = (4, 3, 2)
    x, pruner = clip(3, shape), create({"type": "dtd", "level": level})
    view = video_view(x, shape, pixels_BVC=x)
    counts = torch.tensor([3, 8, 20])
    plain = pruner(view, counts).keep_BV
    padded = pruner(pad_view(view, 5, (14, 3)), counts).keep_BV
    assert torch.equal(padded[:, :24], plain)
    assert not padded[:, 24:].any()
    for b in range(3):
        assert torch.equal(pruner(view_rows(view, [b]), counts[b : b + 1]).keep_BV[0], plain[b])


@pytest.mark.parametrize("shape", [(4, 3, 5), (6, 2, 2), (5, 1, 9)])
def test_cells_are_found_again_behind_an_earlier_stage(shape: tuple[int, int, int]) -> None:
    """Top rows and whole frames may be gone; a cell whose predecessor is gone counts as new."""
    cells, (frames, rows, cols) = cells_of(shape), shape
    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        left = (torch.rand(len(cells), generator=g) < 0.5).nonzero().flatten()
        if not any(cells[v][2] == rows - 1 for v in left):
            continue
        table = torch.tensor([[f * rows + r, c, f] for _, f, r, c in cells])[left]
        row, col, tile = table.T[:, None]
        real = torch.ones(1, len(left)).bool()
        before, exists = cell_before(row, col, tile, torch.zeros_like(row), real, (frames * rows, cols))
        where = {cells[v]: n for n, v in enumerate(left.tolist())}
        for n, v in enumerate(left.tolist()):
            image, frame, r, c = cells[v]
            expected = where.get((image, frame - 1, r, c))
            assert bool(exists[0, n]) == (expected is not None)
            assert expected is None or before[0, n] == expected


def test_videos_of_other_sizes_in_one_row_keep_to_themselves() -> None:
    layouts = [Layout((Grid(2, 3),) * 3, video=True), Layout((Grid(4, 4),)), Layout((Grid(3, 2),) * 4, video=True)]
    cells, parts, top, tiles = [], [], 0, 0
    for number, layout in enumerate(layouts):
        table = layout.table + torch.tensor([0, top, 0, tiles])
        cells += [(number, t, r - t * layout.grids[0].rows, c) for _, r, c, t in layout.table.tolist()]
        parts.append(torch.cat([table, torch.full((len(table), 1), number)], 1))
        top, tiles = top + layout.canvas[0], tiles + len(layout.grids)
    _, row, col, tile, image = torch.cat(parts).T[:, None]
    before, exists = cell_before(row, col, tile, image, torch.ones_like(row).bool(), (top, 4))
    where = {cell: v for v, cell in enumerate(cells)}
    for v, (image, frame, r, c) in enumerate(cells):
        expected = where.get((image, frame - 1, r, c))
        assert bool(exists[0, v]) == (expected is not None)
        assert expected is None or before[0, v] == expected


def test_change_is_finite_on_awkward_tokens() -> None:
    x = torch.zeros(1, 4, D)
    x[0, 1], x[0, 2], x[0, 3] = 1e-8, 1e7, -1e7
    before = torch.tensor([[3, 0, 1, 2]])
    assert change(x, before, "feature").tolist()[0] == pytest.approx([1, 1, 0, 2], abs=1e-5)
    assert change(x, before, "pixel").isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"level": "token"}, "no level 'token'; choose one of feature, pixel"),
        ({"threshold": 1.5}, "a cosine between -1 and 1, got 1.5"),
        ({"level": "pixel", "threshold": -0.1}, "a difference of at least 0, got -0.1"),
    ],
)
def test_refusals_say_what_is_possible(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create({"type": "dtd", **arguments})


@pytest.mark.parametrize("level", ["feature", "pixel"])
def test_a_still_video_with_one_cut_keeps_both_scenes_first_frames(level: str) -> None:
    family = "llava_next_video"
    inputs = batch([(4, ["video"], 3)], family=family)
    frames = inputs["pixel_values_videos"]
    frames[:, 1:6], frames[:, 7:] = frames[:, :1], frames[:, 6:7]
    model = attach(tiny_model(family), PruningPlan([Stage({"type": "dtd", "level": level}, 0, keep_tokens=8)]))
    with record(model) as trace, torch.no_grad():
        model(**inputs)
    assert chosen(trace.stages[0].retained_RV[0]) == {*range(4), *range(24, 28)}


def test_tiles_of_an_image_are_no_frames() -> None:
    """Two samples of four equal rectangles, frames of a video and tiles of an image."""
    x = torch.ones(2, 24, D)
    of_video = torch.tensor([True, False])[:, None].expand(2, 24)
    view = video_view(x, (4, 2, 3), video_BV=of_video)
    selection = create({"type": "dtd", "threshold": 0.99})(view, torch.tensor([20, 20]))
    assert selection.keep_BV.sum(1).tolist() == [6, 24]
    assert len(create("dtd")(view, torch.tensor([5, 5])).scores_BV[1].unique()) == 1


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "video_llava", "llava_next_video"])
@pytest.mark.parametrize(
    "arguments", [{}, {"threshold": 0.8}, {"level": "pixel"}], ids=["budget", "threshold", "pixel"]
)
def test_videos_of_a_model(family: str, arguments: dict[str, Any]) -> None:
    level = arguments.get("level", "feature")
    if why_unavailable(resolve(tiny_model(family)), create({"type": "dtd", **arguments}), 0):
        assert (family, level) == ("video_llava", "pixel"), "whose class token has no pixels"
        return
    inputs = batch([(4, ["video"], 3), (3, ["video", "image"], 2)], family=family)
    plan = PruningPlan([Stage("random", 0, keep_ratio=0.8), Stage({"type": "dtd", **arguments}, 2, keep_ratio=0.4)])
    whole = PruningPlan([Stage({"type": "dtd", **arguments}, 0, keep_ratio=0.4)])
    for stages in (whole, plan):
        pruned = attach(tiny_model(family), stages)
        with record(pruned) as trace, torch.no_grad():
            pruned(**inputs)
        note = trace.stages[-1]
        came = trace.stages[0].retained_RV if len(trace.stages) > 1 else torch.ones_like(note.retained_RV)
        assert note.view is not None
        for r, layouts in enumerate(note.layouts):
            table = layouts[0].table
            tokens = came[r, : len(table)].nonzero().flatten()
            cells = []
            for v in tokens.tolist():
                _, row, col, tile = table[v].tolist()
                cells.append((0, tile, row - sum(grid.rows for grid in layouts[0].grids[:tile]), col))
            seen = note.view.vision_BVD if level == "feature" else note.view.pixels_BVC
            changes = naive_changes(seen[r], cells, level)
            if not layouts[0].video and len(layouts[0].grids) > 1:
                continue  # tiles of other sizes are no frames
            kept = note.vision_out[r]
            expected = (
                {v for v, value in enumerate(changes) if value is None or value >= 0.2}
                if "threshold" in arguments
                else naive_keep(changes, kept)
            )
            assert chosen(note.retained_RV[r]) == {int(tokens[v]) for v in expected}
            if stages is whole and layouts[0].video:
                first = layouts[0].grids[0].rows * layouts[0].grids[0].cols
                assert note.retained_RV[r, :first].all() or kept < first
