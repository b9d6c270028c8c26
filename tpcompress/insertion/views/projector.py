"""View `projector`: input of the projector for each vision token, and the projector itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpcompress.families import Parts, Tower, list_families
from tpcompress.families.base import ToTokens
from tpcompress.insertion.views.registry import captures
from tpcompress.insertion.views.stage_context import StageContext
from tpcompress.pruners.views import ViewSpec


def not_per_token(parts: Parts, spec: ViewSpec, layer: int) -> str | None:
    """Reason why a projector does not take its input token by token, or why its output is not at the stage; or None."""
    tower = parts.family.tower
    assert tower is not None
    if tower.projected is None:
        known = ", ".join(f.name for f in list_families().values() if f.tower is not None and f.tower.projected)
        return f"projector, but the projector of {parts.family.name} does not work token by token; take one of {known}"
    if layer > 0:
        return "projector, whose values are those of the language model's input; set layer: 0"
    return None


def projected(tower: Tower) -> ToTokens | None:
    """How rows of the projector's input become vision tokens."""
    return tower.projected


def project(stage: StageContext) -> dict[str, Any]:
    """The field with the projector."""
    return {"project": stage.parts.projector}


@captures(
    "projector", "projector_input", to_tokens=projected, gradient=True, why_unavailable=not_per_token, more=project
)
def projector(x: Tensor, parts: Parts) -> Tensor:
    """The projector's input as it is."""
    return x
