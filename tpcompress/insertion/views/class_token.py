"""Refusal of views of the class token in towers without one."""

from __future__ import annotations

from tpcompress.families import Parts
from tpcompress.pruners.views import ViewSpec


def no_class_token(parts: Parts, spec: ViewSpec, layer: int) -> str | None:
    """Reason why a model has no views of a class token, or None."""
    tower = parts.family.tower
    assert tower is not None
    if tower.has_class(parts.model.config):
        return None
    return f"{spec.name}, but the tower of this model has no class token; read tower_received instead"
