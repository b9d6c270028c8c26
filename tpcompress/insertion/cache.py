"""What a KV cache carries for us: the state of its request, and the length of the conversation that it stands for.

After a cut the layers hold fewer columns than the conversation has tokens. Whoever asks a cache for its length (slicing
of ids in `generate`, positions of new tokens) means the conversation; whoever makes a mask means a layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

STATE = "_tpcompress_state"
"""Attribute of a KV cache that carries the request's `CachedPrefix`."""


class Conversation:
    """Mixed into the class of a cache that a stage has shortened. (A stand-in method would hold its cache alive.)"""

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Columns that are held, and those that were dropped from among them."""
        held, dropped = held_columns(self, layer_idx), getattr(self, STATE).dropped
        if isinstance(held, Tensor):
            return torch.where(held > 0, held + dropped, held)
        return held + dropped if held else 0

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        """Columns that a layer really holds: masks read this."""
        return super().get_seq_length(layer_idx)  # type: ignore[misc,no-any-return]

    def __reduce__(self) -> tuple[Any, ...]:
        return _revived, (type(self).__mro__[2], self.__dict__)


@functools.cache
def _conversing(kind: Any) -> Any:
    """The class of caches of some kind that answer with the length of their conversation."""
    return type(kind.__name__, (Conversation, kind), {})


def _revived(kind: Any, state: dict[str, Any]) -> Any:
    """A copied or unpickled cache."""
    made = _conversing(kind)
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
    """Leave a request's state on its cache.

    Args:
        cache: a cache of transformers.
        state: what the next call will find; its `dropped` says how many columns the counted layer holds less than the
            conversation has.
    """
    forget(cache)
    setattr(cache, STATE, state)
    if state.dropped:
        kind: Any = type(cache)
        cache.__class__ = _conversing(kind)


def recall(cache: Any, steps: int) -> Any:
    """The state that an earlier call left; None without one, or if the cache was reset since."""
    state = getattr(cache, STATE, None)
    if state is not None and on_host(held := held_columns(cache), steps) and int(held) == 0:
        forget(cache)
        return None
    return state


def forget(cache: Any) -> None:
    """Leave a cache as transformers made it."""
    cache.__dict__.pop(STATE, None)
    if isinstance(cache, Conversation):
        cache.__class__ = type(cache).__mro__[2]


def on_host(length: Any, steps: int) -> bool:
    """A static cache knows its length on the device only; asking makes the host wait, so not at every decode step."""
    return isinstance(length, int) or steps > 1
