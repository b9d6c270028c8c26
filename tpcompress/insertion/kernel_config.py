"""Config of a copied attention module that calls another attention kernel than the original."""

from __future__ import annotations

from typing import Any


class KernelConfig:
    """An attention's config with another attention implementation; every other attribute is the original's.

    Args:
        config: the original.
        kernel: name under which the kernel is registered with `AttentionInterface`.
    """

    def __init__(self, config: Any, kernel: str) -> None:
        self.config = config
        self._attn_implementation = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)
