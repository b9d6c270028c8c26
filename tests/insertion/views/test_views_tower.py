"""What pruners see of the vision tower is what the tower computes, patch by patch, wherever its patches end up."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from looks import LAYER_WORDS, Looks, plan_of, seen, tokens_of
from support import Case, batch, case_id, generate, model_cases, tiny_model
from torch import Tensor

from tpcompress.families import list_families, resolve
from tpcompress.insertion import layer_probe
from tpcompress.insertion.attach import ATTACHED, attach, detach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.views import tower
from tpcompress.insertion.views.tower import tower_layers
from tpcompress.pruners import TokenView

CASES = [case for case in model_cases() if list_families()[case[0]].tower is not None]
WORDS = ("tower_received", "tower_keys", "tower_features")

_models: dict[str, Any] = {}


@pytest.fixture(params=CASES, ids=case_id)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def model(case: Case) -> Iterator[Any]:
    """A family's tiny model with eager attention, detached afterwards."""
    yield from lent(case)


def lent(case: Case, impl: str = "eager") -> Iterator[Any]:
    name = f"{case_id(case)} {impl}"
    if name not in _models:
        _models[name] = tiny_model(case[0], *case[1], impl=impl)
    yield _models[name]
    if hasattr(_models[name], ATTACHED):
        detach(_models[name])


def inputs_of(case: Case, model: Any, *, videos: bool = True) -> dict[str, Any]:
    """Two samples with images of every kind, one without."""
    kinds = [k for k in list_families()[case[0]].tiny.kinds if videos or k != "video"]
    return batch([(5, ["image"], 7), (3, kinds, 4), (4, 0, 9)], family=case[0], config=model.config)


def words_of(model: Any) -> tuple[str, ...]:
    family = resolve(model).family
    return WORDS + (("tower_cls", "tower_cls_query") if family.tower.has_class(model.config) else ())


class Spy:
    """Stands in for the eager kernel of a module's file and remembers the weights of one module."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        file, self.module = sys.modules[type(module).__module__], module
        self.weights: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.kernel = file.eager_attention_forward
        monkeypatch.setattr(file, "eager_attention_forward", self)

    def __call__(self, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.kernel(module, query, key, *args, **kwargs)
        if module is self.module:
            self.weights.append(out[1].detach())
            self.queries.append(query.detach())
            self.keys.append(key.detach())
        return out


@pytest.mark.parametrize("layer", [-2, 0])
def test_values_are_those_of_the_layer(case: Case, model: Any, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys say which patches a token shows; the tests of places below, whether these are the right ones."""
    inputs, family = inputs_of(case, model), resolve(model).family
    block = tower_layers(resolve(model))[layer]
    spy, out = Spy(getattr(block, family.tower.attention), monkeypatch), []
    handle = block.register_forward_hook(lambda m, a, o: out.append(o[0] if isinstance(o, tuple) else o))
    view = seen(model, plan_of(*words_of(model), layers=(layer,)), inputs)[0].view
    handle.remove()
    first = int(family.tower.has_class(model.config))
    packed = out[0].ndim == 2
    side = square_side(case, model)

    def means(parts: list[Tensor]) -> Tensor:
        """One row per token out of (images, positions, ...)."""
        if not packed:  # rows of patches; a packing tower lists the patches of a square one after the other
            n = round((parts[0].shape[1] - first) ** 0.5) // side
            parts = [x[:, first:].unflatten(1, (n, side, n, side)).transpose(2, 3).flatten(1, 4) for x in parts]
        return torch.cat([x.flatten(0, 1).flatten(1) for x in parts]).unflatten(0, (-1, side**2)).mean(1)

    keys = means([k.transpose(1, 2) for k in spy.keys])
    far, patch = torch.cdist(rows_of(view.tower_keys_BLHVD[:, 0], view).double(), keys.double()).min(1)
    whole = far < 1e-4
    if case[0] in ("llava_onevision", "llava_next_video"):  # some tokens are means of patches that overlap
        assert whole.sum() >= 16
    else:
        assert whole.all()
    given = {
        "tower_received_BLHV": means([w.mean(2).transpose(1, 2) for w in spy.weights]),
        "tower_features_BLVD": means([x[None] if packed else x for x in out]),
    }
    if first:
        asked = [q[:, :, :1].expand_as(q).transpose(1, 2) for q in spy.queries]
        given["tower_cls_query_BLHVD"] = means(asked)
        given["tower_cls_BLHV"] = means([w[:, :, 0].transpose(1, 2) for w in spy.weights])
        assert view.tower_cls_BLHV.dtype == torch.float32
    for name, patches in given.items():
        shown = rows_of(getattr(view, name)[:, 0], view)[whole]
        assert (shown - patches[patch[whole]]).abs().max() < 1e-5, name
        if "query" in name and layer == 0:
            continue  # the class token has seen nothing yet
        control = patch[whole].roll(1 if "query" not in name else len(shown) // 2)
        assert (shown - patches[control]).abs().max() > 2e-4, f"control: others differ in {name}"


def square_side(case: Case, model: Any) -> int:
    """Side of the square of patches that a token stands for."""
    if case[0] == "internvl":
        return round(1 / model.config.downsample_ratio)
    if case[0] == "gemma3":
        return model.model.multi_modal_projector.kernel_size
    return getattr(model.config.vision_config, "spatial_merge_size", 1)


def rows_of(x: Tensor, view: TokenView) -> Tensor:
    """(tokens, ...) of every valid token; dimension V stands before the last, or last for scores per head."""
    x = x.movedim(-1 if x.shape[-1] == view.valid_BV.shape[1] else -2, 1)
    return x[view.valid_BV].flatten(1)


def test_a_change_of_pixels_shows_at_its_tokens_and_nowhere_else(case: Case, model: Any) -> None:
    """Keys of the first layer know their own patch only. The hidden states at the stage say where that patch went."""
    inputs = inputs_of(case, model)
    plan = plan_of("tower_keys", layers=(0,))
    before = seen(model, plan, inputs)[0].view
    detach(model)
    for name in [k for k in inputs if k.startswith("pixel_values")]:
        for place in (0, 0.3, 0.55, 0.95):
            changed = dict(inputs) | {name: poked(model, inputs[name], place)}
            after = seen(model, plan, changed)[0].view
            detach(model)
            keys = (after.tower_keys_BLHVD - before.tower_keys_BLHVD).abs().amax((1, 2, 4)) * before.valid_BV
            moved = (after.vision_BVD - before.vision_BVD).norm(dim=-1) * before.valid_BV
            hit = keys > 1e-4
            if not hit.any():  # padding among the tiles, or cropped off
                assert moved.max() < 1e-4
                continue
            assert hit.sum() <= 12, "control: one patch concerns few tokens"
            assert hit.flatten()[moved.flatten().argmax()], "the token that changed most is one that shows the patch"


def poked(model: Any, pixels: Tensor, place: float) -> Tensor:
    """The same pixels, another number in one patch somewhere along the way."""
    pixels = pixels.clone()
    if pixels.ndim == 2:
        pixels[int(place * len(pixels))] += 3.0
        return pixels
    flat, size = pixels.view(-1, *pixels.shape[-3:]), model.config.vision_config.patch_size
    size = size[0] if isinstance(size, list | tuple) else size
    y, x = (int(place * n / size) * size for n in flat.shape[-2:])
    flat[int(place * len(flat)), :, y : y + size, x : x + size] += 3.0
    return pixels


@pytest.mark.parametrize("name", ["llava", "llava_next", "paligemma"])
def test_features_projected_are_the_vision_tokens(name: str) -> None:
    """Token by token, tiles, cropped padding and newlines included."""
    for case in [case for case in CASES if case[0] == name]:
        for model in lent(case):
            inputs = inputs_of(case, model)
            chosen = getattr(model.config, "vision_feature_layer", -1)
            view = seen(model, plan_of("tower_features", layers=(chosen,)), inputs)[0].view
            features = view.tower_features_BLVD[:, 0]
            if name == "paligemma":
                features = model.model.vision_tower.post_layernorm(features)
            with torch.no_grad():
                projected = model.model.multi_modal_projector(features)
            gap = (projected - view.vision_BVD)[view.valid_BV]
            assert gap.abs().max() < 1e-5
            shifted = (projected.roll(1, 1) - view.vision_BVD)[view.valid_BV]
            assert shifted.abs().max() > 1e-2, "control: neighbours differ"


def test_windows_of_qwen_are_undone() -> None:
    """Row and column of a token are where its patches are: neighbours in the image, not in the order of windows."""
    case = ("qwen2_5_vl", ())
    for model in lent(case):
        inputs = batch([(5, ["image"], 7)], family=case[0], config=model.config)
        plan = plan_of("tower_keys", layers=(0,))
        before = seen(model, plan, inputs)[0].view
        detach(model)
        for token in (0, 3, 17, 42, 63):
            pixels = inputs["pixel_values"].clone()
            pixels[4 * token + 2] += 3.0  # the processor lists the four patches of a token one after the other
            after = seen(model, plan, dict(inputs) | {"pixel_values": pixels})[0].view
            detach(model)
            gap = (after.tower_keys_BLHVD - before.tower_keys_BLHVD)[0].abs().amax((0, 1, 3))
            assert gap.nonzero()[:, 0].tolist() == [token]


def test_views_pass_through_generate_and_beams(case: Case, model: Any) -> None:
    inputs = batch([(5, ["image"], 7), (3, ["image", "image"], 4)], family=case[0], config=model.config)
    words = words_of(model)
    direct = seen(model, plan_of(*words), inputs)[0].view
    for beams in (1, 2):
        with record(model) as trace:
            generate(model, inputs, new=2, num_beams=beams)
        view = trace.stages[0].view
        order = [r for sample in ([0], [1, 2]) for _ in range(beams) for r in sample]
        for word in words:
            name = tower_field(word)
            expected = getattr(direct, name)[order]
            assert torch.allclose(getattr(view, name), expected, atol=1e-5)
            assert not torch.allclose(expected[0], expected[-1], atol=1e-3), "control: pictures differ"


def tower_field(word: str) -> str:
    return next(name for name in vars(TokenView.of(torch.zeros(1, 1, 1))) if name.rsplit("_", 1)[0] == word)


def test_behind_an_earlier_stage_the_retained_tokens_keep_their_values(case: Case, model: Any) -> None:
    inputs, layer = inputs_of(case, model), resolve(model).stage_layers[-1]
    stages = [Stage("random", 0, keep_tokens=5), Stage(Looks(words_of(model)), layer, keep_tokens=3)]
    whole = seen(model, plan_of(*words_of(model)), inputs)[0].view
    detach(model)
    view = seen(model, PruningPlan(stages), inputs)[0].view
    assert view.valid_BV.sum(1).max() == 5
    places = torch.stack([view.row_BV, view.col_BV], -1)
    everywhere = torch.stack([whole.row_BV, whole.col_BV], -1)
    for word, along in (("tower_received", -1), ("tower_keys", -2), ("tower_features", -2)):
        after, before = (getattr(x, tower_field(word))[:, 0].movedim(along, 1) for x in (view, whole))
        for r, count in enumerate(view.valid_BV.sum(1).tolist()):
            for v in range(count):
                same = (everywhere[r] == places[r, v]).all(-1) & whole.valid_BV[r]
                assert torch.allclose(after[r, v], before[r, int(same.nonzero()[0])], atol=1e-6)


def test_kernels_agree(case: Case, model: Any) -> None:
    inputs, words = inputs_of(case, model), words_of(model)
    eager = seen(model, plan_of(*words), inputs)[0].view
    for other in lent(case, "sdpa"):
        view = seen(other, plan_of(*words), inputs)[0].view
        for word in words:
            assert torch.allclose(getattr(view, tower_field(word)), getattr(eager, tower_field(word)), atol=1e-4)


def test_layers_stand_in_the_order_asked_for_and_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case, looked = ("llava", ("clip_vision_model",)), []
    monkeypatch.setattr(
        tower, "run_to_kernel", lambda block, *rest: looked.append(block) or layer_probe.run_to_kernel(block, *rest)
    )
    for model in lent(case):
        inputs = inputs_of(case, model)
        every = ("tower_cls", "tower_received", "tower_keys")
        stages = [Stage(Looks(every, (-1, 0)), 0, keep_tokens=9), Stage(Looks(every, (2, -3)), 2, keep_tokens=3)]
        attach(model, PruningPlan(stages))
        with record(model) as trace, torch.no_grad():
            model(**inputs)
        blocks = tower_layers(resolve(model))
        assert looked == [blocks[0], blocks[2]]
        one, two = (stage.view for stage in trace.stages)
        assert one.tower_cls_BLHV.shape[:3] == (len(one.valid_BV), 2, 2)
        last = one.tower_cls_BLHV[0, :, :, -1]
        assert torch.equal(two.tower_cls_BLHV[0, :, :, -1], last), "2 is -1 and -3 is 0: values of the same token"
        assert not torch.equal(last[0], last[1])


def test_nothing_is_watched_that_nobody_reads(model: Any) -> None:
    blocks = tower_layers(resolve(model))

    def hooks() -> int:
        return sum(len(block._forward_pre_hooks) + len(block._forward_hooks) for block in blocks)

    before = hooks()
    for words, more in ((("text",), 0), (("tower_features",), 1), (("tower_keys", "tower_received"), 1)):
        attach(model, plan_of(*words))
        assert hooks() - before == more
        detach(model)
    assert hooks() == before


def test_a_copy_watches_its_own_tower_and_no_view_carries_a_gradient() -> None:
    for model in lent(("llava", ("clip_vision_model",)), "sdpa"):
        inputs = batch([(5, 2, 7), (3, 1, 4)])
        attach(model, plan_of(*words_of(model), *LAYER_WORDS, "attention_next", "input", "normed", "pixels", layer=2))
        twin = copy.deepcopy(model)
        with record(model) as trace:
            model(**inputs)
        detach(model)
        with record(twin) as again:
            twin(**inputs)
        one, two = vars(trace.stages[0].view), vars(again.stages[0].view)
        tensors = {name: x for name, x in one.items() if isinstance(x, Tensor)}
        # The projector's rows carry one: new values are made of them.
        assert one.keys() - tensors.keys() == {"canvas", "soft", "projector_BVC", "project", "pixel_images"}
        for name, x in tensors.items():
            assert torch.equal(x, two[name]), name
            assert x.requires_grad == (name in ("vision_BVD", "text_BSD")), name


def test_tokens_of_rows_agree_with_the_ids(case: Case, model: Any) -> None:
    """Tile, frame and image of each token, which every pruner gets."""
    inputs = inputs_of(case, model)
    stage, _ = seen(model, plan_of(scope="prompt"), inputs)
    rows = tokens_of(stage, inputs, model)
    view = stage.view
    for r, (layouts, (_, places)) in enumerate(zip(stage.layouts, rows, strict=True)):
        tiles = [
            (image, grid) for image, layout in enumerate(layouts) for grid in layout.grids
            for _ in range(grid.rows * grid.cols)
        ]  # fmt: skip
        assert len(tiles) == len(places) == int(view.valid_BV[r].sum())
        assert set(view.image_BV[r, : len(places)].tolist()) == set(range(len(layouts)))
        videos = [image for image, layout in enumerate(layouts) if layout.video]
        assert view.video_BV[r, : len(places)].tolist() == [image in videos for image, _ in tiles]
        if not any(layout.video for layout in layouts):
            assert view.image_BV[r, : len(places)].tolist() == [image for image, _ in tiles]
            starts = [t for t in range(1, len(tiles)) if tiles[t][1] is not tiles[t - 1][1]]
            assert all(view.tile_BV[r, t] == view.tile_BV[r, t - 1] + 1 for t in starts)
