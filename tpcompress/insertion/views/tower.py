"""What pruners see of the vision tower: recomputed at chosen layers while the encoder runs, and kept with its output.

B images or tiles (1 where a tower packs all patches behind each other), N positions of a tower layer, P patches,
H query heads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpcompress.families import Parts
from tpcompress.families.base import ToTokens
from tpcompress.insertion.context import PerContext
from tpcompress.insertion.encoded import TowerValues
from tpcompress.insertion.layer_probe import AttentionInputs, run_to_kernel
from tpcompress.pruners import Pruner
from tpcompress.pruners.base import LOOSE_VIEWS, TOWER_VIEWS

QUERIES = 1024
"""Queries whose attention maps exist at one time."""


@dataclass
class _Capture:
    """What is captured while one encoder runs."""

    on: bool
    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)


_captures: PerContext[_Capture] = PerContext("tpcompress_tower")


class TowerWatch:
    """Hooks on the layers of the tower that some pruner reads; no hook where none does."""

    def __init__(self, parts: Parts, rules: Iterable[Pruner]) -> None:
        self.parts = parts
        self.wanted = {
            (word, layer)
            for rule in rules
            for word in rule.needs & TOWER_VIEWS
            for layer in ((0,) if word in LOOSE_VIEWS else rule.tower_layers)
        }

    def install(self) -> list[RemovableHandle]:
        """Register the hooks; bound methods only, so that copies and pickles of the model keep their own."""
        handles: list[RemovableHandle] = []
        for word, module in (("projector", self.parts.projector), ("pixels", self.parts.vision_tower)):
            if (word, 0) in self.wanted:
                hook = functools.partial(self._given, word)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        layered = [(word, layer) for word, layer in self.wanted if word not in LOOSE_VIEWS]
        for index in sorted({self._index(layer) for _, layer in layered}):
            block = tower_layers(self.parts)[index]
            words = frozenset(word for word, layer in layered if self._index(layer) == index)
            if words - {"tower_features"}:
                hook = functools.partial(self._before, index, words)
                handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
            if "tower_features" in words:
                handles.append(block.register_forward_hook(functools.partial(self._after, index)))
        return handles

    @property
    def is_open(self) -> bool:
        """Whether an encoder runs in this context."""
        return _captures.get(self) is not None

    @contextmanager
    def watching(self, on: bool) -> Iterator[dict[tuple[str, int], Tensor]]:
        """Mark in this context that an encoder runs; yields what the hooks capture meanwhile, by view and layer.

        Args:
            on: whether they capture anything.
        """
        capture = _Capture(on)
        try:
            _captures.set(self, capture)
            yield capture.values
        finally:
            _captures.set(self, None)

    @property
    def _seen(self) -> dict[tuple[str, int], Tensor] | None:
        """Where to put what a hook captures; None if it captures nothing."""
        capture = _captures.get(self)
        return capture.values if capture is not None and capture.on else None

    def values(
        self, seen: Mapping[tuple[str, int], Tensor], modality: str, arguments: Mapping[str, Any], sizes: Sequence[int]
    ) -> TowerValues:
        """What the placeholders of an encoder's features have of each view.

        Args:
            seen: what was seen while it ran; nothing if another tower encodes this modality.
            modality: what it encoded.
            arguments: its arguments by name.
            sizes: placeholders of each feature.

        Raises:
            ValueError: patches and placeholders do not fit.
        """
        values: TowerValues = {}
        for (word, index), x_BNx in seen.items():
            to_tokens, x_BPx = self._reading(word, x_BNx)
            with torch.set_grad_enabled(torch.is_grad_enabled() and word == "projector"):
                made = to_tokens(self.parts.core, modality, arguments, x_BPx.flatten(2))
            if word == "projector" and not made:
                continue
            if [len(x) for x in made] != list(sizes):
                raise ValueError(
                    f"{self.parts.family.name}'s tower shows {[len(x) for x in made]} tokens, but its encoder made "
                    f"{list(sizes)}; please report this model's config and the sizes of the images."
                )
            found = list(made) if word == "pixels" else [x.unflatten(1, x_BPx.shape[2:]) for x in made]
            layers = {layer for name, layer in self.wanted if name == word}
            values |= {(word, layer): found for layer in layers if word in LOOSE_VIEWS or self._index(layer) == index}
        return values

    def _reading(self, word: str, x_BNx: Tensor) -> tuple[ToTokens, Tensor]:
        """How what was seen becomes tokens, and its rows without the class token."""
        tower = self.parts.family.tower
        assert tower is not None
        if word == "projector":
            assert tower.projected is not None
            return tower.projected, x_BNx
        if word == "pixels":
            return tower.pixels or tower.to_tokens, x_BNx
        return tower.to_tokens, x_BNx[:, 1:] if tower.has_class(self.parts.model.config) else x_BNx

    def _index(self, layer: int) -> int:
        return layer % len(tower_layers(self.parts))

    def _before(self, index: int, words: frozenset[str], block: nn.Module, args: tuple, kwargs: dict) -> None:
        seen = self._seen
        if seen is None:
            return
        tower = self.parts.family.tower
        assert tower is not None
        bounds = kwargs.get("cu_seqlens")
        with torch.no_grad():
            if bounds is not None:
                # One run over all patches; which of them see each other is settled below.
                kwargs = kwargs | {"cu_seqlens": torch.tensor([0, len(args[0])])}
            looked = run_to_kernel(block, tower.attention, args, kwargs)
            windows = [looked.key_BGLd.shape[2]] if bounds is None else bounds.diff().tolist()
            made = {
                "tower_keys": lambda: looked.key_BGLd.transpose(1, 2),
                "tower_cls": lambda: _rows(looked, slice(0, 1), slice(None))[:, :, 0].mT,
                "tower_cls_query": lambda: looked.query_BHNd[:, :, :1].expand_as(looked.query_BHNd).transpose(1, 2),
                "tower_received": lambda: _received(looked, windows).mT,
            }
            seen |= {(word, index): made[word]() for word in sorted(words & made.keys())}

    def _given(self, word: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """What the projector or the tower was called with."""
        seen = self._seen
        if seen is None:
            return
        x = args[0] if args else next(iter(kwargs.values()))
        if word == "pixels":
            x = patches(x.detach(), self.parts.model.config.vision_config.patch_size)
        seen[word, 0] = x

    def _after(self, index: int, block: nn.Module, args: tuple, output: Any) -> None:
        seen = self._seen
        if seen is not None:
            x = output[0] if isinstance(output, tuple) else output
            seen["tower_features", index] = (x if x.ndim == 3 else x[None]).detach()


def tower_layers(parts: Parts) -> nn.ModuleList:
    """Layers of a tower that shows some."""
    assert parts.family.tower is not None
    layers = parts.vision_tower.get_submodule(parts.family.tower.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def patches(pixels: Tensor, patch_size: int | Sequence[int]) -> Tensor:
    """The pixels of each patch, (T, P, C * height * width), from pictures (T, C, H, W) or from patches (P, ...)."""
    if pixels.ndim == 2:
        return pixels[None]
    side = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    return torch.nn.functional.unfold(pixels.float(), side, stride=side).mT


def _rows(looked: AttentionInputs, queries: slice, window: slice) -> Tensor:
    """Attention of some positions to those of their window, fp32 (B, H, Q, N)."""
    return looked.logits(looked.query_BHNd[:, :, queries], looked.key_BGLd[:, :, window]).softmax(-1)


def _received(looked: AttentionInputs, windows: Sequence[int]) -> Tensor:
    """Attention that every position receives, mean over the positions of its window, fp32 (B, H, N)."""
    found, start = [], 0
    for length in windows:
        window = slice(start, start + length)
        total: Tensor | None = None
        for first in range(start, start + length, QUERIES):
            part = _rows(looked, slice(first, min(first + QUERIES, start + length)), window).sum(2)
            total = part if total is None else total + part
        assert total is not None
        found.append(total / length)
        start += length
    return torch.cat(found, -1)
