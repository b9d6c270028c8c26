"""View `joint`: CLIP's joint embedding space, which checkpoints of multimodal models do not hold."""

from __future__ import annotations

from typing import Any

from tpcompress.families import Parts
from tpcompress.insertion.views.registry import provides
from tpcompress.insertion.views.stage_context import StageContext
from tpcompress.pruners.views import ViewSpec


def no_checkpoint(parts: Parts, spec: ViewSpec, layer: int) -> str:
    """Reason why the view does not exist."""
    return (
        f"CLIP's projections and text tower, but no {parts.family.name} checkpoint holds them; give the pruner weights "
        f"of its own"
    )


@provides("joint", why_unavailable=no_checkpoint)
def joint(stage: StageContext) -> dict[str, Any]:
    """No fields: a pruner that reads the view is refused when it is attached."""
    return {}
