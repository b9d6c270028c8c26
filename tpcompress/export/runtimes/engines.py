"""Which serving engines can run a plan: what a run that must be servable asks before it trains."""

from __future__ import annotations

from typing import Any

from tpcompress.export.runtimes.base import Runtime, list_runtimes, outside_encoder
from tpcompress.insertion.plan import PruningPlan, Stage


def engines_of(config: Any) -> list[Runtime]:
    """The serving engines that run any plan at all on a model.

    Args:
        config: config of the model.
    """
    simplest = PruningPlan([Stage("uniform", keep_tokens=1)])
    return [each for each in list_runtimes().values() if each.serves and each.refuses(simplest, config) is None]


def served_by(plan: PruningPlan, config: Any) -> list[str]:
    """Titles of the serving engines that run a plan on a model.

    Args:
        plan: the plan.
        config: config of the model.
    """
    return [each.title for each in engines_of(config) if each.refuses(plan, config) is None]


def not_servable(plan: PruningPlan, config: Any) -> str | None:
    """Reason why no serving engine can take a plan; None if one can.

    Where no engine of this package knows the family of the model, a plan is servable if it is a property of the image
    encoder that reads the tokens alone, which is what engines can take.

    Args:
        plan: the plan.
        config: config of the model.
    """
    reason = outside_encoder(plan)
    if reason is not None:
        return reason
    engines = engines_of(config)
    reasons = [each.refuses(plan, config) for each in engines]
    if not engines and plan.stages[0].pruner.needs:
        views = ", ".join(sorted(plan.stages[0].pruner.needs))
        return f"'{plan.stages[0].pruner.name}' reads {views} inside the encoder, which engines do not show"
    return None if None in reasons or not engines else reasons[0]
