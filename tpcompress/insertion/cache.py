"""What a KV cache carries for us: the state of its request, and the length of the conversation that it stands for.

After a cut the layers hold fewer columns than the conversation has tokens. Whoever asks a cache for its length (slicing
of ids in `generate`, positions of new tokens) means the conversation; whoever makes a mask means a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

STATE = "_tpcompress_state"
"""Attribute of a KV cache that carries the request's `Prefix`."""


class ConversationLength:
    """Stands in for `cache.get_seq_length`: columns that are held, and those that were dropped from among them."""

    def __init__(self, cache: Any, dropped: int) -> None:
        self.cache, self.dropped = cache, dropped

    def __call__(self, layer_idx: int = 0) -> int | Tensor:
        held = held_columns(self.cache, layer_idx)
        if isinstance(held, Tensor):
            return torch.where(held > 0, held + self.dropped, held)
        return held + self.dropped if held else 0


class LayerLength:
    """Stands in for `cache.get_query_offset`, which masks read: columns that a layer really holds."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __call__(self, layer_idx: int = 0) -> int | Tensor:
        return held_columns(self.cache, layer_idx)


def held_columns(cache: Any, layer: int = 0) -> int | Tensor:
    """Columns that a layer of a cache holds; for layer 0 without attention, those of the first layer with it."""
    return type(cache).get_seq_length(cache, layer)


def counted_layer(cache: Any) -> int:
    """The layer whose columns `get_seq_length` counts: the first one with attention."""
    return next((i for i, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)), 0)


def remember(cache: Any, state: Any, dropped: int) -> None:
    """Leave a request's state on its cache.

    Args:
        cache: a cache of transformers.
        state: what the next call will find.
        dropped: columns that the counted layer holds less than the conversation has.
    """
    forget(cache)
    setattr(cache, STATE, state)
    if dropped:
        cache.get_seq_length = ConversationLength(cache, dropped)
        cache.get_query_offset = LayerLength(cache)


def recall(cache: Any, steps: int) -> Any:
    """The state that an earlier call left; None without one, or if the cache was reset since."""
    state = getattr(cache, STATE, None)
    if state is not None and on_host(held := held_columns(cache), steps) and int(held) == 0:
        forget(cache)
        return None
    return state


def forget(cache: Any) -> None:
    """Leave a cache as transformers made it."""
    for name in (STATE, "get_seq_length", "get_query_offset"):
        cache.__dict__.pop(name, None)


def on_host(length: Any, steps: int) -> bool:
    """A static cache knows its length on the device only; asking makes the host wait, so not at every decode step."""
    return isinstance(length, int) or steps > 1
