"""vLLM, with the plug-in of this package (`tpcompress.serving.vllm`).

vLLM counts the placeholders of an image before any model runs, caches encoder outputs by the image alone, and has no
bias per key in its attention.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from tpcompress.export.runtimes.base import Runtime, outside_encoder
from tpcompress.families import family_of
from tpcompress.insertion.plan import PruningPlan

ADAPTERS = Path(__file__).parents[2] / "serving" / "vllm" / "families"
"""One file per model type that the plug-in serves; listed without importing it."""


@cache
def served_types() -> tuple[str, ...]:
    """Model types that the plug-in serves."""
    return tuple(sorted(found.name for found in pkgutil.iter_modules([str(ADAPTERS)])))


def _variant(config: Any) -> str | None:
    """Reason why vLLM's class does not fit a variant of its model type, or None."""
    aspect = getattr(config, "vision_aspect_ratio", "anyres_max_9")
    if aspect != "anyres_max_9":
        return f"vLLM counts the tokens of vision_aspect_ratio anyres_max_9, this model has {aspect}"
    return None


class VLLM(Runtime):
    """vLLM: one stage before the language model, on tokens alone, in the families that the plug-in knows."""

    name = "vllm"
    title = "vLLM"
    serves = True

    def refuses(self, plan: PruningPlan, config: Any) -> str | None:
        reason = outside_encoder(plan)
        if reason is not None:
            return reason
        family, stage = family_of(config), plan.stages[0]
        if stage.pruner.needs:
            views = ", ".join(sorted(stage.pruner.needs))
            return f"'{stage.pruner.name}' reads {views}, which vLLM's vision tower does not show"
        if plan.positions == "compact" and family.positions == "mrope":
            return (
                f"compact positions of {family.name} depend on which tokens are retained, and vLLM sets them before; "
                f"use positions: original"
            )
        model_type = getattr(config, "base_model_type", None) or config.model_type
        if model_type not in served_types():
            known = ", ".join(served_types())
            return f"model type {model_type} has no vLLM class in this plug-in (those that have: {known})"
        return _variant(config)
