"""Captures views of the vision tower while an encoder runs.

B images or tiles (1 where a tower packs all patches one after the other), N positions of a tower layer, P patches.
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
from tpcompress.insertion.context import PerContext
from tpcompress.insertion.encoded import TowerValues
from tpcompress.insertion.layer_probe import run_to_kernel
from tpcompress.insertion.views.registry import Capture, providers
from tpcompress.pruners import Pruner
from tpcompress.pruners.views import TOWER_VIEWS


@dataclass
class _Open:
    """An encoder that runs: whether its tower is captured, and what was."""

    on: bool
    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)


_open: PerContext[_Open] = PerContext("tpcompress_tower")


def capture_of(name: str) -> Capture:
    """How a view of the vision tower is captured."""
    capture = providers()[name].capture
    assert capture is not None
    return capture


class TowerWatch:
    """Hooks on the modules around and in the vision tower whose views a pruner needs; none where none does.

    Args:
        parts: of the model.
        pruners: of the plan.
    """

    def __init__(self, parts: Parts, pruners: Iterable[Pruner]) -> None:
        self.parts = parts
        self.wanted = {
            (name, layer)
            for pruner in pruners
            for name in pruner.needs & TOWER_VIEWS
            for layer in (pruner.tower_layers if capture_of(name).of_layer else (0,))
        }

    def install(self) -> list[RemovableHandle]:
        """Register the hooks; bound methods only, so that copies and pickles of the model use their own."""
        handles: list[RemovableHandle] = []
        modules = {"projector_input": self.parts.projector, "tower_input": self.parts.vision_tower}
        for name, _ in sorted(self.wanted):
            if not capture_of(name).of_layer:
                hook = functools.partial(self._input, name)
                handles.append(modules[capture_of(name).at].register_forward_pre_hook(hook, with_kwargs=True))
        layered = [(name, self._index(layer)) for name, layer in self.wanted if capture_of(name).of_layer]
        for index in sorted({index for _, index in layered}):
            block = tower_layers(self.parts)[index]
            names = sorted({name for name, at in layered if at == index})
            before = [name for name in names if capture_of(name).at == "attention"]
            after = [name for name in names if capture_of(name).at == "layer_output"]
            if before:
                hook = functools.partial(self._before, index, before)
                handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
            if after:
                handles.append(block.register_forward_hook(functools.partial(self._after, index, after)))
        return handles

    @property
    def is_open(self) -> bool:
        """Whether an encoder runs in this context."""
        return _open.get(self) is not None

    @contextmanager
    def watching(self, on: bool) -> Iterator[dict[tuple[str, int], Tensor]]:
        """Mark in this context that an encoder runs; yields what the hooks capture meanwhile, by view and layer.

        Args:
            on: whether they capture anything.
        """
        opened = _Open(on)
        try:
            _open.set(self, opened)
            yield opened.values
        finally:
            _open.set(self, None)

    @property
    def _values(self) -> dict[tuple[str, int], Tensor] | None:
        """Where hooks put what they capture; None if they capture nothing."""
        opened = _open.get(self)
        return opened.values if opened is not None and opened.on else None

    def values(
        self,
        captured: Mapping[tuple[str, int], Tensor],
        modality: str,
        arguments: Mapping[str, Any],
        sizes: Sequence[int],
    ) -> TowerValues:
        """Captured values of the placeholders of an encoder's features.

        Args:
            captured: what was captured while it ran; nothing if another tower encodes this modality.
            modality: what it encoded.
            arguments: its arguments by name.
            sizes: placeholders of each feature.

        Raises:
            ValueError: patches and placeholders do not fit.
        """
        values: TowerValues = {}
        for (name, index), x_BNx in captured.items():
            made = self._of_tokens(name, x_BNx, modality, arguments)
            if made is None:
                continue
            if [len(x) for x in made] != list(sizes):
                raise ValueError(
                    f"{self.parts.family.name}'s tower shows {[len(x) for x in made]} tokens, but its encoder made "
                    f"{list(sizes)}; please report this model's config and the sizes of the images."
                )
            of_layer = capture_of(name).of_layer
            for wanted, layer in self.wanted:
                if wanted == name and (not of_layer or self._index(layer) == index):
                    values[name, layer] = made
        return values

    def _of_tokens(self, name: str, x_BNx: Tensor, modality: str, arguments: Mapping[str, Any]) -> list[Tensor] | None:
        """Values of vision tokens from those of patches; None if the projector's input has none of this modality."""
        tower, capture = self.parts.family.tower, capture_of(name)
        assert tower is not None
        to_tokens = capture.to_tokens(tower)
        assert to_tokens is not None
        has_class = capture.of_layer and tower.has_class(self.parts.model.config)
        x_BPx = x_BNx[:, 1:] if has_class else x_BNx
        with torch.set_grad_enabled(torch.is_grad_enabled() and capture.gradient):
            made = to_tokens(self.parts.core, modality, arguments, x_BPx.flatten(2))
        if capture.at == "projector_input" and not made:
            return None
        return [x.unflatten(1, x_BPx.shape[2:]) for x in made] if x_BPx.ndim > 3 else list(made)

    def _index(self, layer: int) -> int:
        return layer % len(tower_layers(self.parts))

    # ------------------------------------------------------------------ hooks

    def _before(self, index: int, names: Sequence[str], block: nn.Module, args: tuple, kwargs: dict) -> None:
        values = self._values
        if values is None:
            return
        tower = self.parts.family.tower
        assert tower is not None
        bounds = kwargs.get("cu_seqlens")
        with torch.no_grad():
            if bounds is not None:
                # One run over all patches; `windows` says which of them attend to each other.
                kwargs = kwargs | {"cu_seqlens": torch.tensor([0, len(args[0])])}
            inputs = run_to_kernel(block, tower.attention, args, kwargs)
            windows = [inputs.key_BGLd.shape[2]] if bounds is None else bounds.diff().tolist()
            for name in names:
                values[name, index] = capture_of(name).make(inputs, windows)

    def _after(self, index: int, names: Sequence[str], block: nn.Module, args: tuple, output: Any) -> None:
        values = self._values
        if values is None:
            return
        x = output[0] if isinstance(output, tuple) else output
        for name in names:
            values[name, index] = capture_of(name).make(x if x.ndim == 3 else x[None])

    def _input(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = self._values
        if values is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            values[name, 0] = capture_of(name).make(x, self.parts)


def tower_layers(parts: Parts) -> nn.ModuleList:
    """Layers of a tower that shows some."""
    assert parts.family.tower is not None
    layers = parts.vision_tower.get_submodule(parts.family.tower.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers
