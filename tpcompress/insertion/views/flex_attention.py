"""Refusal of views of attention under flex attention, whose masks are not tensors."""

from __future__ import annotations

from tpcompress.families import Parts
from tpcompress.pruners.views import ViewSpec


def unreadable_masks(parts: Parts, spec: ViewSpec, layer: int) -> str | None:
    """Reason why attention of a decoder layer cannot be computed, or None."""
    if parts.text_config._attn_implementation == "flex_attention":
        return f"{spec.name}, but the masks of flex attention cannot be read; load with attn_implementation='sdpa'"
    return None
