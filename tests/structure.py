"""The structural class of a family variant, and which tests each class and each family gets by default.

Two variants of one class take the same branches everywhere in `tpcompress/insertion`. So the whole matrix runs on one
variant per class, and every other family gets what depends on its own file: layouts, its tower, one comparison with
the reference and one generation. `scripts/test --all` runs everything on every variant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from support import Case, case_id, model_cases

from tpcompress.families import list_families
from tpcompress.insertion.shorten.masks import layer_kind

READ = {
    "positions": "positions",
    "masks_in_core": "masks_in_core",
    "blocks": "blocks",
    "tiles": "tiles",
    "splits_tiles": "splits_tiles",
    "keys_of": "shares_keys",
    "reads_positions": "reads_positions",
}
"""Fields of `Family` that decide what insertion does, and the fields of `Structure` that hold them."""

PREFERRED = ("llava-clip_vision_model", "qwen2_5_vl", "internvl-qwen2")
"""They stand for their class; other classes are represented by the first of their variants."""


@dataclass(frozen=True)
class Structure:
    """What insertion branches on.

    Attributes:
        positions: `1d` or `mrope`.
        masks_in_core: the core model builds the attention masks.
        blocks: kinds of layers in which vision tokens attend both ways, and whether beyond a window; None without.
        tiles: features may be tiles of one image, or hold several; how they are grouped changes `locate` alone.
        splits_tiles: every rectangle of a feature is a tile or an image.
        shares_keys: some layers attend to the keys of another.
        reads_positions: layers read position ids beside the rotary embedding.
        layer_kinds: the kinds of its decoder layers.
        deepstack: features of earlier tower layers are added inside the language model.
    """

    positions: str
    masks_in_core: bool
    blocks: tuple[tuple[str, ...], bool] | None
    tiles: bool
    splits_tiles: bool
    shares_keys: bool
    reads_positions: bool
    layer_kinds: tuple[str, ...]
    deepstack: bool

    @property
    def hides(self) -> bool:
        """Mode `mask` works at any length: no layer counts columns or carries a state."""
        return self.layer_kinds == ("full_attention",)


@cache
def structure(case: Case) -> Structure:
    """The class of a variant, from its description and its tiny config; no model is built."""
    family = list_families()[case[0]]
    config = family.tiny.config(*case[1])
    text = config.get_text_config()
    layers = range(text.num_hidden_layers)
    return Structure(
        positions=family.positions,
        masks_in_core=family.masks_in_core,
        blocks=family.blocks and (family.blocks.kinds, family.blocks.beyond_window),
        tiles=family.tiles is not None or family.splits_tiles,
        splits_tiles=family.splits_tiles,
        shares_keys=any(family.keys_of(text, layer) != layer for layer in layers),
        reads_positions=family.reads_positions(config),
        layer_kinds=tuple(sorted({layer_kind(text, layer) for layer in layers})),
        deepstack=bool(getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None)),
    )


@cache
def representatives() -> dict[Structure, Case]:
    """The variant that stands for each class."""
    cases = sorted(model_cases(), key=lambda case: case_id(case) not in PREFERRED)
    found: dict[Structure, Case] = {}
    for case in cases:
        found.setdefault(structure(case), case)
    return found


@cache
def first_variants() -> tuple[Case, ...]:
    """The first variant of every family."""
    return tuple((name, family.tiny.variants[0]) for name, family in list_families().items())


def cases(quick: Iterable[Case]) -> list[Any]:
    """Every variant as a parameter; what is not among the quick ones is slow."""
    quick = set(quick)
    return [
        pytest.param(case, id=case_id(case), marks=() if case in quick else pytest.mark.slow) for case in model_cases()
    ]


def named(*names: str) -> list[Case]:
    """Variants by their ids."""
    found = [case for case in model_cases() if case_id(case) in names]
    assert len(found) == len(names), f"a variant of {names} does not exist"
    return found


def each_class(*more: str) -> pytest.MarkDecorator:
    """A test of one variant per class, and of `more` variants by their ids."""
    return pytest.mark.parametrize("subject", cases([*representatives().values(), *named(*more)]), indirect=True)


def each_family() -> pytest.MarkDecorator:
    """A test of the first variant of every family and of one variant per class."""
    chosen = [*first_variants(), *representatives().values()]
    return pytest.mark.parametrize("subject", cases(chosen), indirect=True)


def some(*names: str) -> pytest.MarkDecorator:
    """A test of the named variants; of every variant where slow tests run."""
    return pytest.mark.parametrize("subject", cases(named(*names)), indirect=True)


def plans(
    names: Iterable[str], *quick: str, on: Sequence[str] = (), every_family: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Every variant x plan x position policy.

    Args:
        names: of plans.
        quick: "plan, policy" of what runs by default.
        on: ids of the variants on which it does; without them, one per class.
        every_family: those pairs that run on the first variant of every family, too.
    """
    classes, families = set(named(*on)) if on else set(representatives().values()), set(first_variants())
    known = {f"{name}, {policy}" for name in names for policy in ("original", "compact")}
    assert {*quick, *every_family} <= known, known
    params = []
    for case in model_cases():
        for name in names:
            for policy in ("original", "compact"):
                pair = f"{name}, {policy}"
                runs = (case in classes and pair in quick) or (case in families and pair in every_family)
                marks = () if runs else pytest.mark.slow
                params.append(pytest.param(case, name, policy, id=f"{case_id(case)}-{name} {policy}", marks=marks))
    return pytest.mark.parametrize(("subject", "name", "positions"), params, indirect=["subject"])
