"""HiRED and GlobalCom2 against loops over crops, on an overview and a mosaic and on other rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import batch, make_pruner, make_view, pad_view, tiny_model
from torch import Tensor

from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Pruner, TokenView, create
from tpcompress.pruners.tiles import from_overview, mosaic

SIDE = 4
MOSAICS = [(6, 8), (8, 8), (4, 8), (7, 4), (3, 12)]
"""(rows, columns) of the merged crops of 4 x 4 tokens, without padding."""


def view_of(pruner: Pruner, rows: int, cols: int, B: int = 2) -> TokenView:
    """An overview of 4 x 4 and a mosaic below it."""
    cells = [(r, c, 0) for r in range(SIDE) for c in range(SIDE)]
    cells += [(SIDE + r, c, 1) for r in range(rows) for c in range(cols)]
    row, col, tile = (torch.tensor(x).expand(B, -1) for x in zip(*cells, strict=True))
    x = torch.randn(B, len(cells), 8, generator=torch.Generator().manual_seed(rows))
    view = make_view(pruner, x)
    return TokenView(
        **(vars(view) | {"row_BV": row, "col_BV": col, "tile_BV": tile, "canvas": (SIDE + rows, max(SIDE, cols))})
    )


def crops_of(rows: int, cols: int) -> list[int]:
    """Crop of every cell of the mosaic, with half of the padding on either side."""
    top, left = (math.ceil(n / SIDE) * SIDE - n for n in (rows, cols))
    across = math.ceil(cols / SIDE)
    return [(r + top // 2) // SIDE * across + (c + left // 2) // SIDE for r in range(rows) for c in range(cols)]


def under(rows: int, cols: int) -> list[int]:
    """Crop that lies under every cell of the overview."""
    crops = crops_of(rows, cols)
    cells = [(int((r + 0.5) * rows / SIDE), int((c + 0.5) * cols / SIDE)) for r in range(SIDE) for c in range(SIDE)]
    return [crops[r * cols + c] for r, c in cells]


def head_mean(x: Tensor) -> list[float]:
    return x.double().mean(0).tolist()


@pytest.mark.parametrize(("rows", "cols"), MOSAICS)
def test_hired_against_a_loop(rows: int, cols: int) -> None:
    pruner = create("hired")
    view, n, N = view_of(pruner, rows, cols), SIDE * SIDE, rows * cols
    crops, lies = crops_of(rows, cols), under(rows, cols)
    for k in (1, 5, 12, 20, N, n + N):
        kept = pruner(view, torch.tensor([k, k])).keep_BV
        for b in range(2):
            early, late = (head_mean(view.tower_cls_BLHV[b, layer]) for layer in (0, 1))
            rich = sorted(range(n), key=lambda v: (-early[v], v))[: n // 2]
            content = {j: sum(lies[v] == j for v in rich) for j in set(crops)}
            own = min(k // 2, n)
            overview = sorted(range(n), key=lambda v: (-late[v], v))
            wanted = overview[:own]
            keys = []
            for j in content:
                tokens = sorted((n + i for i in range(N) if crops[i] == j), key=lambda v: (-late[v], v))
                for place, v in enumerate(tokens):
                    keys.append(((place + 0.5) / content[j] if content[j] else math.inf, -late[v], v))
            wanted += [v for _, _, v in sorted(keys)][: k - own]
            wanted += overview[own : own + k - len(wanted)]
            assert sorted(wanted) == kept[b].nonzero()[:, 0].tolist(), k


@pytest.mark.parametrize(("rows", "cols"), MOSAICS)
@pytest.mark.parametrize("temperature", [10.0, 0.02])
def test_globalcom2_against_a_loop(rows: int, cols: int, temperature: float) -> None:
    pruner = make_pruner({"type": "globalcom2", "temperature": temperature})
    view, n, N = view_of(pruner, rows, cols), SIDE * SIDE, rows * cols
    crops, lies = crops_of(rows, cols), under(rows, cols)
    for k in (1, 5, 12, 20, N, n + N):
        kept = pruner(view, torch.tensor([k, k])).keep_BV
        for b in range(2):
            own = head_mean(view.tower_cls_BLHV[b, 0])
            grid = torch.tensor(own[:n]).view(1, 1, SIDE, SIDE)
            lead = torch.nn.functional.interpolate(grid, (rows, cols), mode="bilinear", align_corners=False).flatten()
            names = sorted(set(crops))
            sums = [sum(own[v] for v in range(n) if lies[v] == j) for j in names]
            power = [math.exp((s - max(sums)) / temperature) for s in sums]
            keys = [((place + 0.5) / n, -own[v], v) for place, v in enumerate(sorted(range(n), key=lambda v: -own[v]))]
            for j, p in zip(names, power, strict=True):
                tokens = [i for i in range(N) if crops[i] == j]
                a = torch.tensor([own[n + i] for i in tokens])
                score = (lead[tokens] / lead[tokens].norm() + a / a.norm()) / 2
                share = (1 + p / sum(power) - 1 / len(names)) * len(tokens)
                order = score.argsort(descending=True).tolist()
                keys += [((place + 0.5) / share, -own[n + tokens[i]], n + tokens[i]) for place, i in enumerate(order)]
            wanted = sorted(v for _, _, v in sorted(keys)[:k])
            assert wanted == kept[b].nonzero()[:, 0].tolist(), k


def test_padding_and_rows_of_other_kinds() -> None:
    """In one batch: an overview with crops, an image of one rectangle, and tiles that stand by themselves."""
    for config in ({"type": "hired"}, {"type": "globalcom2"}):
        pruner = make_pruner(config)
        view = view_of(pruner, 4, 8, B=3)
        tile = view.tile_BV.clone()
        tile[1], tile[2] = 0, torch.arange(48) // 12
        view = TokenView(**(vars(view) | {"tile_BV": tile}))
        counts = torch.tensor([13, 13, 14])
        kept = pruner(view, counts).keep_BV
        padded = pruner(pad_view(view, 5, (9, 9)), counts).keep_BV
        assert torch.equal(padded[:, :48], kept)
        late = view.tower_cls_BLHV[:, -1].mean(1)
        assert torch.equal(kept[1], torch.zeros(48, dtype=torch.bool).index_fill(0, late[1].topk(13).indices, True))
        assert sorted(kept[2].view(4, 12).sum(1).tolist()) == [3, 3, 4, 4]
        for number, of_tile in enumerate(kept[2].view(4, 12)):
            best = late[2].view(4, 12)[number].topk(int(of_tile.sum())).indices
            assert sorted(best.tolist()) == of_tile.nonzero()[:, 0].tolist()


def test_a_dropped_token_of_the_overview_counts_as_nothing() -> None:
    view = view_of(create("globalcom2"), 4, 4, B=1)
    x = torch.ones(1, 32)
    assert torch.allclose(from_overview(x, mosaic(view), view.canvas), torch.ones(1, 32))
    keep = torch.tensor([v != 5 for v in range(32)])
    left = TokenView(
        **{k: v[:, keep] if isinstance(v, Tensor) and k[-2:] == "BV" else v for k, v in vars(view).items()}
    )
    found = from_overview(x[:, keep], mosaic(left), left.canvas)[0, 15:]
    assert found.tolist() == [float(v != 5) for v in range(16)]


@pytest.mark.parametrize("config", [{"type": "hired"}, {"type": "globalcom2"}], ids=lambda config: config["type"])
def test_in_a_model_with_crops(config: dict[str, Any]) -> None:
    model = attach(tiny_model("llava_next"), PruningPlan([Stage(config, 0, keep_tokens=20)]))
    with record(model) as trace, torch.no_grad():
        model(**batch([(4, ["image"], 3), (3, ["wide"], 2)], family="llava_next"))
    stage = trace.stages[0]
    assert stage.vision_out == [20, 20]
    parts = mosaic(stage.view)
    assert parts.tiled_B1.all()
    assert [int(x) for x in parts.crop_BV.amax(1)] == [4, 2]
    own = (parts.overview_BV & stage.selection.keep_BV).sum(1).tolist()
    assert own == [10, 10] if config["type"] == "hired" else all(0 < x < 20 for x in own)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "hired", "alpha": 1.5}, "hired needs alpha between 0 and 1"),
        ({"type": "hired", "attention": "text"}, "hired has no attention source 'text'"),
        ({"type": "globalcom2", "temperature": 0.0}, "globalcom2 needs a temperature above 0"),
        ({"type": "mustdrop", "share": 0.0}, "mustdrop needs share above 0 and at most 1, got 0.0"),
        ({"type": "mustdrop", "keys": 2.0}, "mustdrop needs keys between 0 and 1"),
        ({"type": "window_merge", "side": 1}, "a side of at least 2 tokens, got 1"),
        ({"type": "window_merge", "threshold": 2.0}, "a threshold that is a cosine between -1 and 1, got 2.0"),
        ({"type": "window_merge", "metric": "pixels"}, "no metric 'pixels'; choose one of tower, tokens"),
    ],
)
def test_refused_values(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create(config)
