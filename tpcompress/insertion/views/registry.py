"""Registry of views: every file of this folder that fills a view of `tpcompress.pruners.views` registers it here.

A view of the language model is a function of the stage:

    @provides("attention", why_unavailable=flex_attention)
    def attention(stage: StageContext) -> dict[str, Tensor]: ...

A view of the vision tower is a function of what its layer computes while an encoder runs:

    @captures("tower_keys", "attention")
    def tower_keys(inputs: AttentionInputs, windows: Sequence[int]) -> Tensor: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from tpcompress.families import Parts, Tower
from tpcompress.families.base import ToTokens
from tpcompress.insertion.views.stage_context import StageContext
from tpcompress.open_set import modules_in
from tpcompress.pruners.views import VIEWS, ViewSpec

Why = Callable[[Parts, ViewSpec, int], str | None]
"""(parts, view, layer of the stage) -> reason why a model has no such view there, starting with what is needed."""

PACKAGE = "tpcompress.insertion.views"

CAPTURE_POINTS = ("attention", "layer_output", "projector_input", "tower_input")
"""Where a view of the vision tower is captured, with the arguments of its function: before a tower layer (its
`AttentionInputs`, the lengths of its attention windows), after a tower layer (its output), before the projector or the
tower (its input, the parts of the model)."""


def patch_tokens(tower: Tower) -> ToTokens | None:
    """How values of patches become values of vision tokens."""
    return tower.to_tokens


@dataclass(frozen=True)
class Capture:
    """How a view of the vision tower is made while an encoder runs.

    Attributes:
        at: one of `CAPTURE_POINTS`.
        make: values (B, N, ...) of the patches from the arguments of that point.
        to_tokens: (tower) -> how the values of patches become those of vision tokens.
        gradient: whether the values carry a gradient.
    """

    at: str
    make: Callable[..., Tensor]
    to_tokens: Callable[[Tower], ToTokens | None] = patch_tokens
    gradient: bool = False

    @property
    def of_layer(self) -> bool:
        """Whether the view is one of chosen tower layers."""
        return self.at in ("attention", "layer_output")


@dataclass(frozen=True)
class Provider:
    """How one view is filled.

    Attributes:
        provide: its fields at a stage.
        gradient: whether they carry a gradient.
        why_unavailable: reason beyond those of its place.
        capture: for a view of the vision tower, what is captured; its first field holds the captured values.
    """

    provide: Callable[[StageContext], Mapping[str, Any]]
    gradient: bool = False
    why_unavailable: Why | None = None
    capture: Capture | None = None


_providers: dict[str, Provider] = {}


def provides(name: str, gradient: bool = False, why_unavailable: Why | None = None) -> Callable[[Any], Any]:
    """Register a function as the provider of a view."""

    def register(provide: Callable[[StageContext], Mapping[str, Any]]) -> Callable[[StageContext], Mapping[str, Any]]:
        _add(name, Provider(provide, gradient, why_unavailable))
        return provide

    return register


def captures(
    name: str,
    at: str,
    to_tokens: Callable[[Tower], ToTokens | None] = patch_tokens,
    gradient: bool = False,
    why_unavailable: Why | None = None,
    more: Callable[[StageContext], Mapping[str, Any]] = lambda stage: {},
) -> Callable[[Any], Any]:
    """Register a function as the capture of a view of the vision tower.

    Args:
        name: of the view.
        at: one of `CAPTURE_POINTS`.
        to_tokens: see `Capture`.
        gradient: see `Capture`.
        why_unavailable: reason beyond those of its place.
        more: further fields at a stage, beside the captured values.
    """

    def register(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _add(name, Provider(more, gradient, why_unavailable, Capture(at, make, to_tokens, gradient)))
        return make

    return register


def _add(name: str, provider: Provider) -> None:
    if name not in VIEWS:
        raise ValueError(f"There is no view '{name}'; give a field of `TokenView` to it.")
    if name in _providers:
        raise ValueError(f"View '{name}' has two providers; remove one.")
    if provider.capture is not None and provider.capture.at not in CAPTURE_POINTS:
        raise ValueError(f"View '{name}' is captured at '{provider.capture.at}'; take one of {CAPTURE_POINTS}.")
    _providers[name] = provider


@cache
def providers() -> dict[str, Provider]:
    """The providers of all views by name, found in this folder; in the code of an export, of those that it needs."""
    modules_in(PACKAGE)
    return _providers
