"""What `compat` and the official counts select, against slow loops written from observed official behaviour."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import batch, make_pruner, make_view, pad_view, tiny_model, view_rows
from torch import Tensor

from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import TokenView, create
from tpcompress.pruners.eadp import official_relevance

D = 16


def view_for(config: dict[str, Any], B: int, V: int, grid: tuple[int, int] | None = None) -> TokenView:
    return make_view(make_pruner(config), torch.randn(B, V, D, generator=torch.Generator().manual_seed(2)), grid)


def kept(selection: Any, b: int) -> list[int]:
    return selection.keep_BV[b].nonzero().flatten().tolist()


def best(score: Any, count: int, of: Any = None) -> list[int]:
    """Places of the largest scores, ties to the earlier one."""
    return sorted(range(len(score)) if of is None else of, key=lambda i: (-float(score[i]), i))[: max(count, 0)]


def unit(x: Tensor) -> np.ndarray:
    a = x.double().numpy()
    return a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)


# ------------------------------------------------------------------------------------------------------------- HoloV


def official_holov(a: Tensor, h: Tensor, k: int, crops: int, beta: float = 0.09) -> list[int]:
    """Per run: mean of 1e3 a + beta var, var scaled to the run's own attention; the diagonal of the cosines is 0."""
    a, n = a.double().numpy(), len(a)
    sizes = [n // crops + (p < n % crops) for p in range(crops)]
    edges = [0, *itertools.accumulate(sizes)]
    members = [list(range(edges[p], edges[p + 1])) for p in range(crops) if sizes[p]]
    scores = []
    for crop in members:
        if len(crop) == 1:
            scores.append(a[crop[0]])
            continue
        x = unit(h[crop])
        similar = x @ x.T
        np.fill_diagonal(similar, 0.0)
        others = len(crop) - 1
        mean = similar.sum(1) / others
        var = ((similar - mean[:, None]) ** 2).sum(1) / others
        salient = 1e3 * a[crop]
        scores.append((salient + beta * var * (salient.mean() / (var.mean() + 1e-6))).mean())
    weights = np.array(scores) / (sum(scores) + 1e-6)
    quota = np.floor(weights * k).astype(int)
    for p in best(weights, k - int(quota.sum())):
        quota[p] += 1
    return sorted(i for crop, q in zip(members, quota, strict=True) for i in best(a, min(int(q), len(crop)), crop))


@pytest.mark.parametrize(("V", "crops"), [(1, 16), (5, 16), (20, 16), (23, 4), (64, 16), (67, 16), (64, 1)])
def test_holov_compat(V: int, crops: int) -> None:
    config = {"type": "holov", "crops": crops, "compat": True}
    view = view_for(config, V, V)
    selection = create(config)(view, torch.arange(1, V + 1))
    padded = create(config)(pad_view(view, 9, (1, V + 9)), torch.arange(1, V + 1))
    for b in range(V):
        a, h = view.tower_cls_BLHV[b, 0].mean(0), view.tower_features_BLVD[b, 0]
        assert kept(selection, b) == official_holov(a, h, b + 1, crops)
        assert kept(padded, b) == kept(selection, b)


def test_the_variance_of_official_holov_cancels() -> None:
    """Shares are those of beta 0, whatever beta: the scale of a run's variance is the run's own attention."""
    view = view_for({"type": "holov"}, 3, 576, (24, 24))
    for k in (64, 128, 192):
        chosen = [
            create({"type": "holov", "beta": beta, "compat": compat})(view, torch.full((3,), k)).keep_BV
            for beta, compat in ((0.0, True), (0.09, True), (3.0, True), (0.0, False), (3.0, False))
        ]
        assert all(torch.equal(chosen[0], other) for other in chosen[1:4])
        assert not torch.equal(chosen[0], chosen[4]), "control: with the scale of the row it does not cancel"


# ----------------------------------------------------------------------------------------------------------- HiPrune


def test_the_layers_of_hiprune_are_those_of_the_paper() -> None:
    """Layer 9 of 24, counted from 1, and the last but one; for Qwen2.5-VL layer 16 and the last one."""
    assert create("hiprune").tower_layers == (9 - 1, -2)
    assert create({"type": "hiprune", "object_layer": 15, "deep_layer": -1}).tower_layers == (16 - 1, -1)


# -------------------------------------------------------------------------------------------------------------- EADP


def loop_relevance(x: Tensor, words: Tensor, mu: float = 0.5) -> np.ndarray:
    """Negated cosines; global part to the mean embedding; local part from a fifth of the words, of lowest entropy."""
    mean = words.double().mean(0, keepdim=True)
    far_global = -(unit(mean) @ unit(x).T)[0]
    far = -(unit(words) @ unit(x).T)
    entropies = []
    for row in far:
        p = np.exp((row - row.max()) * 100)
        p = p / p.sum()
        entropies.append(-(p * np.log(p + 1e-12)).sum())
    read = sorted(range(len(words)), key=lambda i: entropies[i])[: max(1, int(len(words) * 0.2))]
    weight = np.exp([-(entropies[i] - entropies[read[0]]) / 0.01 for i in read])
    local = sum(w * far[i] for w, i in zip(weight / weight.sum(), read, strict=True))
    return mu * far_global + (1 - mu) * local


@pytest.mark.parametrize("count", [1, 4, 5, 10, 23])
def test_eadp_compat_relevance(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    x, text = torch.randn(3, 12, D, generator=g), torch.randn(3, 40, D, generator=g)
    words = (torch.arange(40) >= 7) & (torch.arange(40) < 7 + count)
    found = official_relevance(x, torch.ones(3, 12).bool(), text, words.expand(3, 40))
    for b in range(3):
        assert found[b].tolist() == pytest.approx(loop_relevance(x[b], text[b, words]).tolist(), abs=1e-5)


def test_eadp_compat_retains_what_the_question_does_not_resemble() -> None:
    """The sign decides: tokens that point at the words are demanded least."""
    config = {"type": "eadp", "compat": True, "beta": 2.0}
    view = make_view(create(config), torch.randn(1, 20, D, generator=torch.Generator().manual_seed(0)), (4, 5))
    x = view.vision_BVD.clone()
    x[0, 12] = view.text_BSD[0][view.text_valid_BS[0]].mean(0)
    view = replace(view, vision_BVD=x)
    relevance = loop_relevance(x[0], view.text_BSD[0][view.text_valid_BS[0]])
    assert int(relevance.argmin()) == 12
    demand = torch.tensor((relevance - relevance.min() + 1e-6) / (np.ptp(relevance) + 1e-6)).view(1, 1, 4, 5)
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2) / 2)
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]
    around = torch.nn.functional.pad(demand, (1, 1, 1, 1), mode="reflect")
    w = (torch.nn.functional.conv2d(around, kernel).flatten() ** 2).numpy()
    similar = (unit(x[0]) @ unit(x[0]).T + 1) / 2
    picks: list[int] = []
    for _ in range(7):
        now = similar[picks].max(0) if picks else np.zeros(20)
        gain = [float(w @ np.maximum(similar[u] - now, 0)) for u in range(20)]
        picks.append(best(gain, 1, [u for u in range(20) if u not in picks])[0])
    assert kept(create(config)(view, torch.tensor([7])), 0) == sorted(picks)
    ours = create({"type": "eadp", "beta": 2.0})(view, torch.tensor([7]))
    assert kept(ours, 0) != sorted(picks), "control: the sign decides"


# ---------------------------------------------------------------------------------------------------------- PruMerge


def class_row(view: TokenView, b: int) -> np.ndarray:
    q, k = (x[b, 0].double().transpose(0, 1).flatten(1) for x in (view.tower_cls_query_BLHVD, view.tower_keys_BLHVD))
    return ((q * k).sum(-1) / math.sqrt(k.shape[-1])).softmax(0).numpy()


def with_extra(a: np.ndarray, chosen: set[int]) -> list[int]:
    """The token of the rest stands in the place of the best of the rest."""
    return sorted(chosen | set(best(a, 1, [i for i in range(len(a)) if i not in chosen])))


@pytest.mark.parametrize("V", [576, 60, 24, 7])
def test_prumerge_plus_compat_at_a_fixed_ratio(V: int) -> None:
    """Half by attention, half at even distances from half a stride on; the range ends before the last place."""
    config = {"type": "prumerge", "plus": True, "compat": True}
    budgets = sorted({1, 2, 3, V // 4, V // 2, V - 1, V} - {0})
    view = view_rows(view_for(config, 1, V), [0] * len(budgets))
    selection = create(config)(view, torch.tensor(budgets))
    a = class_row(view, 0)
    for b, budget in enumerate(budgets):
        half = budget // 2
        places = set(range(V // half // 2, V - 1, V // half)) if half else set()
        assert kept(selection, b) == with_extra(a, set(best(a, half)) | places)
        if V == 576 and budget == 144:
            assert len(places) == half == 72, "the official reshape requires equal halves"


def test_prumerge_plus_adaptive_leaves_out_the_last_place() -> None:
    """576 tokens: the official range is 0, s, 2 s, ... below 575, also where s divides 575 = 5 * 5 * 23."""
    config, seen = {"type": "prumerge", "plus": True, "adaptive": True}, set()
    view = view_for(config, 1, 576)
    for sharp in (0.2, 1.0, 1.4, 2.0, 3.0, 6.0):
        view_s = replace(view, tower_cls_query_BLHVD=view.tower_cls_query_BLHVD * sharp)
        a = class_row(view_s, 0)
        q1, q3 = np.percentile(a, [25, 75])
        outliers = {i for i in range(576) if a[i] > q3 + 1.5 * (q3 - q1)}
        stride = max(576 // len(outliers) // 3, 1) if outliers else 576
        seen.add(stride)
        places = set(range(0, 575, stride)) if outliers else set()
        assert kept(create(config)(view_s, torch.tensor([1])), 0) == with_extra(a, outliers | places)
    assert len(seen) > 2


def test_prumerge_refuses_a_share_that_compat_does_not_have() -> None:
    with pytest.raises(ValueError, match="takes half of the budget at even distances, got uniform 0.5"):
        create({"type": "prumerge", "plus": True, "compat": True, "uniform": 0.5})


# --------------------------------------------------------------------------------------------------------------- DTD

STD = (0.26862954, 0.26130258, 0.27577711)


def video(frames: int, rows: int, cols: int, images: int, seed: int = 0) -> tuple[TokenView, Tensor]:
    """A view, and its pixels (frames, cells, images, channels, rest)."""
    g, cells = torch.Generator().manual_seed(seed), rows * cols
    still = torch.randn(1, cells, 1, 3, 8, generator=g)
    pixels = still + torch.rand(frames, cells, 1, 1, 1, generator=g) * torch.randn(
        frames, cells, images, 3, 8, generator=g
    )
    x = pixels.flatten(2).flatten(0, 1)[None]
    tile = torch.arange(frames).repeat_interleave(cells)[None]
    view = TokenView.of(x, (frames * rows, cols), tile_BV=tile, pixels_BVC=x, pixel_images=images)
    return view, pixels.double()


@pytest.mark.parametrize("std", [(), STD], ids=["normalised", "unit"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_dtd_compares_the_last_image_with_the_first_of_the_token_before(images: int, std: tuple[float, ...]) -> None:
    view, pixels = video(5, 3, 4, images)
    weight = torch.tensor(std or (1.0, 1.0, 1.0), dtype=torch.float64)[:, None]
    apart = ((pixels[1:, :, -1] - pixels[:-1, :, 0]).abs() * weight).mean((-1, -2))
    threshold = float(apart.flatten().sort().values[30:32].mean())
    config = {"type": "dtd", "level": "pixel", "threshold": threshold, "pixel_std": std}
    expected = list(range(12)) + [12 * (t + 1) + c for t in range(4) for c in range(12) if apart[t, c] >= threshold]
    assert kept(create(config)(view, torch.tensor([1])), 0) == expected


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("level", ["feature", "pixel"])
def test_dtd_drops_a_share_of_every_frame(level: str, share: float) -> None:
    view, pixels = video(5, 3, 4, 2)
    x = pixels.flatten(2)
    feature = 1 - torch.nn.functional.cosine_similarity(x[1:], x[:-1], dim=-1)
    change = feature if level == "feature" else (pixels[1:, :, -1] - pixels[:-1, :, 0]).abs().mean((-1, -2))
    config = {"type": "dtd", "level": level, "threshold": share, "relative": True}
    expected = list(range(12))
    for t in range(4):
        gone = sorted(range(12), key=lambda c: float(change[t, c]))[: int(12 * share)]
        expected += [12 * (t + 1) + c for c in range(12) if c not in gone]
    pruner = create(config)
    assert not pruner.exact_count
    assert kept(pruner(view, torch.tensor([1])), 0) == expected
    assert kept(pruner(pad_view(view, 7, (22, 4)), torch.tensor([1])), 0) == expected


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_pixels_of_a_merged_token_are_those_of_its_patches_image_by_image(family: str) -> None:
    model = tiny_model(family)
    inputs = batch([(4, ["video"], 3)], family=family)
    attach(model, PruningPlan([Stage({"type": "dtd", "level": "pixel"}, 0, keep_tokens=3)]))
    with record(model) as trace, torch.no_grad():
        model(**inputs)
    view, vision = trace.stages[0].view, model.config.vision_config
    assert view.pixel_images == vision.temporal_patch_size
    patches = inputs["pixel_values_videos"].unflatten(1, (3, vision.temporal_patch_size, -1))
    merged = vision.spatial_merge_size**2
    for token in range(view.pixels_BVC.shape[1]):
        own = patches[merged * token : merged * (token + 1)]
        images = view.pixels_BVC[0, token].unflatten(0, (vision.temporal_patch_size, 3, -1))
        for image in range(vision.temporal_patch_size):
            for channel in range(3):
                assert torch.equal(images[image, channel], own[:, channel, image].flatten())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"relative": True}, "drops a share of each frame, between 0 and 1, got None"),
        ({"relative": True, "threshold": 1.5, "level": "pixel"}, "between 0 and 1, got 1.5"),
        ({"pixel_std": [0.2]}, "takes pixel_std at level pixel"),
        ({"pixel_std": [0.0], "level": "pixel"}, "numbers above 0, one per channel"),
    ],
)
def test_dtd_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create({"type": "dtd", **arguments})


# --------------------------------------------------------------------------------------------------------- VisPruner


def test_vispruner_compares_in_double_precision() -> None:
    """Parallel features are equally similar; norms rounded to fp32 would rank them by their lengths."""
    view = view_rows(view_for({"type": "vispruner"}, 1, 3), [0] * 300)
    g = torch.Generator().manual_seed(0)
    features = torch.randint(1, 90, (300, 3, 1), generator=g) * torch.randint(1, 50, (300, 1, 12), generator=g).float()
    single = torch.nn.functional.normalize(features, dim=-1).double()
    similar = (single @ single.mT).float()
    assert (similar[:, 0, 1] > similar[:, 2, 1]).any(), "control: with fp32 norms token 0 would go in some row"
    view = replace(view, tower_features_BLVD=features[:, None])
    selection = create({"type": "vispruner", "important": 0.0})(view, torch.full((300,), 2))
    assert all(kept(selection, b) == [0, 1] for b in range(300)), "of two duplicates of token 1 the later goes"
