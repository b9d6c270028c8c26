"""EVS and VidCom2 against loops over frames and tokens, and EVS's count against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from pruners.test_dtd import clip, naive_changes, video_view
from support import make_pruner, pad_view
from torch import Tensor

from tpcompress.pruners import TokenView, create
from tpcompress.pruners.evs import retained_count

SHAPES = [(4, 3, 5), (5, 2, 2), (3, 1, 7), (1, 3, 4)]
"""(frames, rows, columns)."""


def cells_of(shape: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    frames, rows, cols = shape
    return [(0, t, r, c) for t in range(frames) for r in range(rows) for c in range(cols)]


def chosen(keep_V: Tensor) -> list[int]:
    return keep_V.nonzero()[:, 0].tolist()  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------ EVS


@pytest.mark.parametrize("shape", SHAPES)
def test_evs_keeps_the_first_frame_and_what_changed_most(shape: tuple[int, int, int]) -> None:
    x = clip(2, shape)
    n, V = shape[1] * shape[2], x.shape[1]
    for k in range(n, V + 1):
        kept = create("evs")(video_view(x, shape), torch.tensor([k, k])).keep_BV
        for b in range(2):
            changes = naive_changes(x[b], cells_of(shape), "feature")
            order = sorted(range(V), key=lambda v: (-(255.0 if changes[v] is None else changes[v]), v))
            assert chosen(kept[b]) == sorted(order[:k])


def test_less_than_a_frame_is_spread_as_uniform_spreads_it() -> None:
    shape, x = (4, 3, 5), clip(2, (4, 3, 5))
    image = TokenView.of(x[:, :15], (3, 5))
    for k in (1, 4, 9, 14):
        counts = torch.tensor([k, k])
        expected = create("uniform")(image, counts).keep_BV
        kept = create("evs")(video_view(x, shape), counts).keep_BV
        assert torch.equal(kept[:, :15], expected)
        assert not kept[:, 15:].any()
        assert torch.equal(create("evs")(image, counts).keep_BV, expected)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("compat", [False, True])
def test_the_count_of_a_rate_is_known_from_the_size(rate: float, compat: bool) -> None:
    """Rows of other sizes beside each other, and two videos in one row."""
    pruner = create({"type": "evs", "rate": rate, "compat": compat})
    for shape in [*SHAPES, (10, 2, 5), (10, 1, 1)]:
        x, (T, rows, cols) = clip(1, shape), shape
        total, n = T * rows * cols, rows * cols
        wanted = max(
            n, int(total * (1.0 - rate)) if compat else math.floor(total * round(100 * (1 - rate)) / 100 + 1e-9)
        )
        assert retained_count(n, T, rate, compat) == wanted
        view = pad_view(video_view(x, shape), 6, (T * rows + 1, cols))
        assert int(pruner(view, torch.tensor([1])).keep_BV.sum()) == wanted
    x = torch.cat([clip(1, (4, 2, 5)), clip(1, (2, 2, 5), 1)], 1)
    tile = torch.arange(6).repeat_interleave(10)[None]
    both = TokenView.of(x, (12, 5), tile_BV=tile, image_BV=(tile >= 4).long())
    kept = pruner(both, torch.tensor([1])).keep_BV[0]
    counts = [int(kept[:40].sum()), int(kept[40:].sum())]
    assert counts == [retained_count(10, 4, rate, compat), retained_count(10, 2, rate, compat)]


def test_counts_that_differ_by_the_rounding_of_floats() -> None:
    assert [retained_count(1, 100, q, True) for q in (0.8, 0.9)] == [19, 9]
    assert [retained_count(1, 100, q) for q in (0.8, 0.9)] == [20, 10]


def test_still_and_nearly_still_videos() -> None:
    shape = (5, 2, 3)
    x = clip(1, shape)[:, :6].repeat(1, 5, 1)
    pruner = create("evs")
    assert chosen(pruner(video_view(x, shape), torch.tensor([6])).keep_BV[0]) == list(range(6))
    x[0, 6 * 3 + 2] = -x[0, 2]  # one cell of frame 3, which is as new again in frame 4
    assert chosen(pruner(video_view(x, shape), torch.tensor([8])).keep_BV[0]) == [*range(6), 20, 26]


def test_bf16_gives_the_choice_of_the_same_numbers() -> None:
    x = clip(2, (4, 3, 5)).bfloat16()
    kept = [create("evs")(video_view(y, (4, 3, 5)), torch.tensor([20, 40])).keep_BV for y in (x, x.float())]
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "evs", "rate": 1.0}, "evs needs a rate in .0, 1., the share of tokens to be pruned, got 1.0"),
        ({"type": "evs", "compat": True}, "only with a rate; set rate"),
        ({"type": "vidcom2", "temperature": 0.0}, "a temperature above 0, got 0.0"),
        ({"type": "vidcom2", "compat": "sglang"}, "no compat 'sglang'; choose one of official, vllm"),
        ({"type": "flashvid", "alpha": 2.0}, "alpha between 0 and 1"),
        ({"type": "flashvid", "min_segments": 0}, "at least one segment"),
        ({"type": "flashvid", "threshold": 1.5}, "a threshold that is a cosine"),
        ({"type": "flashvid", "attention": "text"}, "no attention source 'text'"),
    ],
)
def test_refused_values(config: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create(config)


# -------------------------------------------------------------------------------------------------------- VidCom2


def vidcom2(x_VD: Tensor, frames: int, temperature: float = 0.01) -> tuple[list[list[float]], list[float], list[float]]:
    """v + u of each token by frame, the share w of each frame, and - mean v, in fp64."""
    x_VD = x_VD.double()
    variance = [float((c - c.mean()).square().mean()) for c in x_VD.T]
    low = sorted(sorted(range(len(variance)), key=lambda c: variance[c])[: len(variance) // 2])
    z = [x[low] / x[low].norm() for x in x_VD]
    n = len(z) // frames
    split = [z[t * n : (t + 1) * n] for t in range(frames)]

    def gauss(a: Tensor, c: Tensor) -> float:
        return sum(math.exp(-float((a - c).square().sum()) / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    whole = torch.stack(z).mean(0)
    centre = [torch.stack(one).mean(0) for one in split]
    v = [[gauss(a, whole) for a in one] for one in split]
    alike = [[gauss(a, whole) + gauss(a, centre[t]) for a in one] for t, one in enumerate(split)]
    unusual = [-sum(one) / n for one in v]
    power = [math.exp((e - max(unusual)) / temperature) for e in unusual]
    return alike, [1 + p / sum(power) - 1 / frames for p in power], unusual


def frames_of(shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """One frame stands out."""
    x = clip(2, shape, seed) + torch.linspace(-2, 2, 16)
    n = shape[1] * shape[2]
    x[:, -n:] += 3 * torch.randn(2, n, 16, generator=torch.Generator().manual_seed(seed))
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_vidcom2_is_webster_over_frames(shape: tuple[int, int, int], temperature: float) -> None:
    x, (T, rows, cols) = frames_of(shape), shape
    n, V = rows * cols, x.shape[1]
    before, orders = [torch.zeros(V, dtype=torch.bool)] * 2, []
    for b in range(2):
        alike, share, unusual = vidcom2(x[b], T, temperature)
        places = [sorted(range(n), key=lambda i, t=t: (alike[t][i], i)) for t in range(T)]
        first = sorted(range(T), key=lambda t: (-unusual[t], t))
        later = sorted((t, j) for t in range(T) for j in range(1, n))
        later.sort(key=lambda one: ((one[1] + 0.5) / share[one[0]], -unusual[one[0]]))
        orders.append([t * n + places[t][j] for t, j in [(t, 0) for t in first] + later])
    for k in range(1, V + 1):
        kept = make_pruner({"type": "vidcom2", "temperature": temperature})(
            video_view(x, shape), torch.tensor([k, k])
        ).keep_BV
        for b in range(2):
            assert chosen(kept[b]) == sorted(orders[b][:k])
            assert (kept[b] | ~before[b]).all(), "a smaller budget is part of a larger one"
        before = list(kept)


@pytest.mark.parametrize("compat", ["official", "vllm"])
def test_vidcom2_with_the_counts_of_others(compat: str) -> None:
    shape, x = (4, 3, 5), frames_of((4, 3, 5))
    for k in (2, 9, 15, 30, 60):
        kept = make_pruner({"type": "vidcom2", "compat": compat})(video_view(x, shape), torch.tensor([k, k])).keep_BV
        for b in range(2):
            alike, share, _ = vidcom2(x[b], 4)
            flat = [a for one in alike for a in one]
            wanted: list[int] = []
            for t in range(4):
                count = max(1, round(min(1.0, k / 60 * share[t]) * 15))
                wanted += [15 * t + i for i in sorted(range(15), key=lambda i, t=t: alike[t][i])[:count]]
            if compat == "vllm":
                target = max(4, min(k, 60))
                while len(wanted) > target:
                    wanted.remove(max(wanted, key=lambda v: flat[v]))
                while len(wanted) < target:
                    wanted.append(min((v for v in range(60) if v not in wanted), key=lambda v: flat[v]))
            assert chosen(kept[b]) == sorted(wanted)


def test_vidcom2_on_frames_in_another_order_on_equal_frames_and_on_images() -> None:
    shape, x = (4, 3, 5), frames_of((4, 3, 5))
    pruner, counts = create("vidcom2"), torch.tensor([9, 20])
    turned = [2, 0, 3, 1]
    other = x.view(2, 4, 15, 16)[:, turned].flatten(1, 2)
    kept = [pruner(video_view(y, shape), counts).keep_BV.view(2, 4, 15) for y in (x, other)]
    assert torch.equal(kept[0][:, turned], kept[1])
    assert (kept[0][1].sum(1).argmax() == 3).item(), "the frame that stands out has most"
    equal = pruner(video_view(torch.ones(1, 60, 16), shape), torch.tensor([22])).keep_BV.view(4, 15).sum(1)
    assert equal.tolist() == [6, 6, 5, 5]
    alike, _, _ = vidcom2(x[0, :15], 1)
    image = pruner(TokenView.of(x[:1, :15], (3, 5)), torch.tensor([6])).keep_BV[0]
    assert chosen(image) == sorted(sorted(range(15), key=lambda i: alike[0][i])[:6])
