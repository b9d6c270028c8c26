"""In every family: what pruners see around the vision tower and behind the last norm."""

from __future__ import annotations

import pytest
import torch
from looks import plan_of, seen, tokens_of
from subjects import Subject

from tpcompress.families import resolve
from tpcompress.families.towers import POOLING, SHRINKING, TILED
from tpcompress.insertion.attach import attach, detach


@pytest.mark.parametrize("late", [False, True], ids=["input", "inside"])
def test_the_last_norm(subject: Subject, late: bool) -> None:
    parts, inputs = resolve(subject.base), subject.batch((5, 1, 7), (4, 0, 9), (3, 2, 5))
    layer, given = parts.stage_layers[-1] if late else 0, []
    handle = parts.layers[layer].register_forward_pre_hook(
        lambda module, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    stage, _ = seen(subject.model, plan_of("normed", layer=layer), inputs)
    with torch.no_grad():
        subject.base(**inputs)
        handle.remove()
        normed_BSD = parts.final_norm(given[0])
    for r, (b, places) in enumerate(tokens_of(stage, inputs, subject.base)):
        assert torch.allclose(stage.view.normed_BVD[r, : len(places)], normed_BSD[b, places], atol=2e-5)
        assert torch.allclose(stage.view.text_normed_BSD[r], normed_BSD[b], atol=2e-5)


def test_the_projector_makes_the_tokens_of_its_rows(subject: Subject) -> None:
    """Projected once more, every row is its token, bit for bit; other projectors are refused by name."""
    plan, tower = plan_of("projector"), subject.family.tower
    if tower is None or tower.projected is None:
        with pytest.raises(ValueError, match="needs projector, but the (patches|projector) of .* take one of .*llava"):
            attach(subject.model, plan)
        return
    for kinds in [["image"], [kind for kind in subject.kinds if kind != "video"]]:
        inputs = subject.batch((5, kinds, 7), (3, 0, 4), (4, ["image"], 6))
        stage, _ = seen(subject.model, plan, inputs)
        detach(subject.model)
        made = stage.view.project(stage.view.projector_BVC)
        assert torch.allclose(made[stage.view.valid_BV], stage.view.vision_BVD[stage.view.valid_BV], atol=1e-6)
        assert not torch.allclose(made.roll(1, 1), stage.view.vision_BVD, atol=1e-2), "control: rows differ"
    if "video" in subject.kinds:
        attach(subject.model, plan)
        with pytest.raises(ValueError, match="video features of this call came without projector"):
            subject.model(**subject.batch((5, ["video"], 7)))


def test_pixels_are_those_of_the_patches(subject: Subject) -> None:
    """A change of one patch changes one token; where patches weigh alike, their mean is the image's."""
    plan, tower = plan_of("pixels"), subject.family.tower
    if tower is None:
        with pytest.raises(ValueError, match="needs pixels, but the patches of .* cannot be followed"):
            attach(subject.model, plan)
        return
    inputs = subject.batch((5, ["image"], 7))
    name = next(name for name in inputs if name.startswith("pixel_values"))
    changed = inputs[name].clone()
    changed[-1 if changed.ndim == 2 else (*[-1] * (changed.ndim - 3), slice(None), -1, -1)] += 1.0
    view = seen(subject.model, plan, inputs)[0].view
    detach(subject.model)
    after = seen(subject.model, plan, inputs | {name: changed})[0].view
    moved_V = (after.pixels_BVC - view.pixels_BVC).abs().amax((0, 2)) > 1e-6
    if tower in (TILED, SHRINKING, POOLING):  # borders may be cut off, and a shrunk token is made of several patches
        assert moved_V.sum() <= 4
        return
    assert moved_V.nonzero().flatten().tolist() == [len(moved_V) - 1]
    assert view.pixels_BVC.mean().item() == pytest.approx(inputs[name].float().mean().item(), abs=1e-5)
