"""State that belongs to one context (a thread or an asyncio task), not to the model that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class PerContext(Generic[Value]):
    """One value per owner and context.

    A new thread starts without values. `contextvars.copy_context` (and with it asyncio tasks and `asyncio.to_thread`)
    passes on those of its caller. Owners stay free of state, so they can be copied and pickled at any time.

    Args:
        name: name of the context variable.
    """

    def __init__(self, name: str) -> None:
        self._values: ContextVar[Mapping[Any, Value]] = ContextVar(name)

    def get(self, owner: Any) -> Value | None:
        """The owner's value in this context; None if it is not set."""
        return self._values.get({}).get(owner)

    def set(self, owner: Any, value: Value | None) -> None:
        """Set the owner's value in this context; None removes it."""
        # A new mapping each time: contexts that were copied from this one hold the old mapping.
        values = {other: kept for other, kept in self._values.get({}).items() if other is not owner}
        self._values.set(values if value is None else {**values, owner: value})
