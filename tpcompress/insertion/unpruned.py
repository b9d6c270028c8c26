"""Plans that retain every vision token: why, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from tpcompress.families import Parts
from tpcompress.insertion.plan import PruningPlan


def check_fixed_count(parts: Parts, plan: PruningPlan) -> None:
    """Check that counts are below the vision tokens of an image, where the model makes as many of every image.

    A ratio of 1 is a plan's way to retain everything on purpose; families whose counts depend on the image are checked
    on real rows (`tpcompress.insertion.effect`) and at the first call.

    Raises:
        ValueError: the plan retains everything.
    """
    tokens = parts.family.tokens_per_image(parts.model.config)
    counted = all(stage.keep_tokens is not None and stage.pruner.exact_count for stage in plan.stages)
    if tokens is not None and counted and plan.scope != "prompt" and plan.counts(tokens)[-1] == tokens:
        raise ValueError(unpruned_message(plan, [tokens], f"every image of {type(parts.model).__name__}"))


def unpruned_message(plan: PruningPlan, totals: Sequence[int], where: str, images: Sequence[int] = ()) -> str:
    """Why a plan prunes nothing, and what to do.

    Args:
        plan: the plan.
        totals: vision tokens of each budget row.
        where: what the rows are.
        images: vision tokens of each image, if budget rows are tiles.
    """
    budget = ", ".join(str(stage.budget) for stage in plan.stages)
    wider = ""
    if plan.scope == "tile" and max(images, default=0) > max(totals):
        wider = f", or scope: image, which counts over the {span(images)} tokens of an image"
    return (
        f"The plan prunes nothing: it retains all of the {span(totals)} vision tokens per {plan.scope} in {where} "
        f"(budget: {budget}). Give a smaller budget, such as keep_tokens={max(1, max(totals) // 4)} or "
        f"keep_ratio=0.25{wider}."
    )


def span(values: Sequence[int]) -> str:
    """`64`, or `64 to 1088`; `0` without values."""
    low, high = min(values, default=0), max(values, default=0)
    return str(low) if low == high else f"{low} to {high}"
