"""KV caches of pruned conversations: they carry the state of their request, and report the conversation's length.

After a cut the layers hold fewer columns than the conversation has tokens. `get_seq_length()` (slicing of ids in
`generate`, positions of new tokens) means the conversation; masks are made for what a layer holds.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

STATE = "_tpcompress_state"
"""Attribute of a KV cache with the `CachedPrefix` of its request."""


class Conversation:
    """Mixed into the class of a cache that a stage has shortened. (A bound method as stand-in would keep it alive.)"""

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Columns of the conversation: those that the layer holds, and the dropped ones."""
        held, dropped = held_columns(self, layer_idx), getattr(self, STATE).dropped
        if isinstance(held, Tensor):
            return torch.where(held > 0, held + dropped, held)
        return held + dropped if held else 0

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        """Columns that a layer holds; masks are made for these."""
        return super().get_seq_length(layer_idx)  # type: ignore[misc,no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self).__mro__[2], self.__dict__)


@functools.cache
def _conversation_class(kind: Any) -> Any:
    """The class of caches of some kind that report the length of their conversation."""
    return type(kind.__name__, (Conversation, kind), {})


def _restored(kind: Any, state: dict[str, Any]) -> Any:
    """Restore a copied or unpickled cache."""
    made = _conversation_class(kind)
    kv_cache = made.__new__(made)
    kv_cache.__dict__.update(state)
    return kv_cache


def held_columns(cache: Any, layer: int = 0) -> int | Tensor:
    """Columns that a layer of a cache holds; for layer 0 without attention, those of the first layer with it."""
    held: int | Tensor = cache.get_query_offset(layer)
    return held


def counted_layer(cache: Any) -> int:
    """The layer whose columns `get_seq_length` counts: the first one with attention."""
    return next((i for i, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)), 0)


def remember(cache: Any, state: Any) -> None:
    """Keep a request's state on its cache.

    Args:
        cache: a cache of transformers.
        state: for the next call; its `dropped` is the number of columns of the conversation that the counted layer does
            not hold.
    """
    forget(cache)
    setattr(cache, STATE, state)
    if state.dropped:
        kind: Any = type(cache)
        cache.__class__ = _conversation_class(kind)


def recall(cache: Any, steps: int) -> Any:
    """The state that an earlier call left; None without one, or if the cache was reset since."""
    state = getattr(cache, STATE, None)
    if state is not None and on_host(held := held_columns(cache), steps) and int(held) == 0:
        forget(cache)
        return None
    return state


def forget(cache: Any) -> None:
    """Restore a cache to what transformers made it."""
    cache.__dict__.pop(STATE, None)
    if isinstance(cache, Conversation):
        cache.__class__ = type(cache).__mro__[2]


def on_host(length: Any, steps: int) -> bool:
    """Whether a length may be read: a static cache has it on the device, and decode steps must not sync for it."""
    return isinstance(length, int) or steps > 1
