"""The rules of a ranking: every registered pruner without weights, at a layer where it runs on a model, or a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tpcompress.errors import did_you_mean
from tpcompress.export.runtimes import not_servable
from tpcompress.families import Parts
from tpcompress.insertion.budget import Budget, amount_text
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.views.available import why_unavailable
from tpcompress.pruners import Pruner, create
from tpcompress.pruners.catalogue import plans_of
from tpcompress.pruners.registry import list_pruners


@dataclass(frozen=True)
class Rule:
    """A pruner and the layer at which it is ranked.

    Attributes:
        name: its name in the registry.
        layer: first decoder layer that sees fewer tokens.
    """

    name: str
    layer: int

    def plan(self, budget: Budget) -> PruningPlan:
        """The plan of one stage at a budget."""
        return PruningPlan([Stage(self.name, self.layer, budget.keep_ratio, budget.keep_tokens)])


@dataclass(frozen=True)
class Refusal:
    """A rule that is not in the table, and why.

    Attributes:
        rule: name of the pruner.
        reason: one line.
        budget: the budget at which it does not run; None if it runs at none.
    """

    rule: str
    reason: str
    budget: str | None = None

    def __str__(self) -> str:
        at = "" if self.budget is None else f" at {self.budget}"
        return f"{self.rule}{at}: {self.reason}"


def rules_for(
    parts: Parts, names: Sequence[str] | None = None, servable: bool = False
) -> tuple[list[Rule], list[Refusal]]:
    """The untrained rules that run on a model, and the others with the reason.

    A rule acts at layer 0 where it runs there. Otherwise it acts at the layer of its paper, or at the nearest layer at
    which it runs on this model.

    Args:
        parts: parts of the dense model.
        names: pruners to rank; None for all.
        servable: only rules that a serving engine can run on this model.

    Raises:
        ValueError: an unknown name, a name given twice, or no rule that runs.
    """
    known = list_pruners()
    for name in names or ():
        if name not in known:
            raise ValueError(f"No pruner '{name}'; see tpcompress pruners.{did_you_mean(name, known)}")
    if len(set(names or ())) < len(names or ()):
        raise ValueError(f"rules names one twice: {', '.join(names or ())}; leave it out.")
    rules: list[Rule] = []
    refused: list[Refusal] = []
    for name in names or known:
        found: Rule | int | str = _placed(parts, create(name))
        if isinstance(found, int):
            rule = Rule(name, found)
            reason = not_servable(rule.plan(Budget(keep_tokens=1)), parts.model.config) if servable else None
            found = rule if reason is None else f"no serving engine can take it: {reason}"
        if isinstance(found, Rule):
            rules.append(found)
        else:
            refused.append(Refusal(name, found))
    if not rules:
        raise ValueError(f"None of the rules runs on this model; {refused[0]}.")
    return rules, refused


def budget_of(value: Budget | float | str) -> tuple[str, Budget]:
    """A budget with its label: a count (`64`), a ratio (`0.25`) or a fraction (`1/9`).

    Raises:
        ValueError: none of these.
    """
    if isinstance(value, Budget):
        return (str(value.keep_tokens) if value.keep_ratio is None else amount_text(value.keep_ratio)), value
    text = str(value).strip()
    try:
        if "/" in text:
            return text, Budget(keep_ratio=float(Fraction(text)))
        if isinstance(value, float) or "." in text:
            return text, Budget(keep_ratio=float(text))
        return text, Budget(keep_tokens=int(text))
    except (ValueError, ZeroDivisionError) as error:
        why = f" ({error})" if "keep_" in str(error) else ""
        raise ValueError(f"budgets: {text!r} is not a budget{why}; give a count (64) or a ratio (0.25, 1/9).") from None


def read_budgets(values: str | Sequence[Budget | float | str]) -> dict[str, Budget]:
    """Budgets by label, from a list or from text such as `32,64` or `1/9,0.25`.

    Raises:
        ValueError: no budget, one that cannot be read, is 0, or is given twice.
    """
    listed = [word for word in values.split(",") if word.strip()] if isinstance(values, str) else list(values)
    found: dict[str, Budget] = {}
    for label, budget in map(budget_of, listed):
        label = repr(budget.keep_ratio) if label in found else label  # ratios that differ in the fourth decimal
        if budget.keep_tokens == 0:
            raise ValueError("budgets: 0 keeps nothing; tpcompress find-layer finds where all tokens can be withdrawn.")
        if budget in found.values():
            raise ValueError(f"budgets: {label} is given twice; leave one out.")
        found[label] = budget
    if not found:
        raise ValueError("budgets is empty; give counts (32,64) or ratios (1/9,0.25).")
    return found


def _placed(parts: Parts, pruner: Pruner) -> int | str:
    """The layer at which a pruner is ranked, or why it is not."""
    if pruner.keeps_none:
        return "retains no token, whatever the budget; tpcompress find-layer finds its layer"
    if pruner.learned:
        return "has weights to train; rank compares rules that need no training"
    reasons = {layer: why_unavailable(parts, pruner, layer) for layer in parts.stage_layers}
    possible = [layer for layer, reason in reasons.items() if reason is None]
    if not possible:
        return f"needs {reasons[parts.stage_layers[-1]]}"
    wanted = 0 if possible[0] == 0 else _paper_layer(pruner)
    return min(possible, key=lambda layer: (abs(layer - wanted), layer))


def _paper_layer(pruner: Pruner) -> int:
    """Layer of the rule's first stage in its paper plan; 2, as most papers have it, without one."""
    plans = plans_of(type(pruner))
    stages = PruningPlan.from_yaml(plans[pruner.name]).stages if pruner.name in plans else []
    return next((stage.layer for stage in stages if stage.pruner.name == pruner.name), 2)
