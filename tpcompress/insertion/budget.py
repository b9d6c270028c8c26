"""Budgets: how many vision tokens a stage retains, and the one reader of `keep_tokens` / `keep_ratio` arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tpcompress.errors import counted
from tpcompress.pruners import Pruner

MAX_DENOMINATOR = 1000
"""Largest denominator of a ratio that is written as a fraction."""


@dataclass(frozen=True)
class Budget:
    """Number of vision tokens that a stage retains; exactly one of the two fields is set.

    Attributes:
        keep_ratio: share in (0, 1] of the tokens that the projector produced, independent of earlier stages.
        keep_tokens: absolute count; rows with fewer tokens keep all. 0 is reserved for pruners with `keeps_none`.

    Raises:
        ValueError: both fields or neither, or a value out of range.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        ratio, tokens = self.keep_ratio, self.keep_tokens
        if (ratio is None) == (tokens is None):
            given = "both" if ratio is not None else "neither"
            raise ValueError(
                f"A stage needs exactly one of keep_ratio and keep_tokens, got {given}; remove or add one."
            )
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1):
            raise ValueError(f"keep_ratio must be in (0, 1], got {ratio!r}; to keep all tokens, drop the stage.")
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
            raise ValueError(f"keep_tokens must be a whole number of at least 1, got {tokens!r}.")

    def count(self, num_tokens: int) -> int:
        """Tokens to keep of `num_tokens`. A ratio is rounded here only: max(1, round(ratio * num_tokens))."""
        if self.keep_tokens is not None:
            return min(self.keep_tokens, num_tokens)
        assert self.keep_ratio is not None
        return min(max(1, round(self.keep_ratio * num_tokens)), num_tokens)

    def __str__(self) -> str:
        if self.keep_tokens is not None:
            return f"{self.keep_tokens} tokens"
        assert self.keep_ratio is not None
        return f"{amount_text(self.keep_ratio)} of the tokens"


def amount_text(amount: float) -> str:
    """A count, or a ratio as a short decimal or the fraction that was given: `64`, `0.25`, `1/9`."""
    if amount >= 1 or float(f"{amount:.3g}") == amount:
        return f"{amount:.6g}"
    fraction = Fraction(amount).limit_denominator(MAX_DENOMINATOR)
    near = fraction.numerator and abs(float(fraction) - amount) < 1e-9
    return str(fraction) if near else f"{amount:.3g}"


def check_budget(pruner: Pruner, budget: Budget) -> None:
    """Check that a budget of 0 is given to pruners with `keeps_none`, and to no others.

    Raises:
        ValueError: the budget does not fit the pruner.
    """
    if pruner.keeps_none and budget.keep_tokens != 0:
        raise ValueError(f"Pruner '{pruner.name}' retains nothing, got a budget of {budget}; write keep_tokens: 0.")
    if budget.keep_tokens == 0 and not pruner.keeps_none:
        raise ValueError(
            f"Pruner '{pruner.name}': keep_tokens must be a whole number of at least 1, got 0; a stage that drops "
            f"every vision token is one of 'vtw'."
        )


def read_budgets(
    values: Budget | float | Sequence[Budget | float] | None = None,
    keep_tokens: int | Sequence[int] | None = None,
    keep_ratio: float | Sequence[float] | None = None,
) -> list[Budget] | None:
    """Read budgets from any form that `attach`, `budgets` and `load` accept.

    Args:
        values: one budget, or one per stage; integers are counts, floats are ratios.
        keep_tokens: one count, or one per stage.
        keep_ratio: one ratio, or one per stage.

    Returns:
        One budget per given value; None if no argument is given.

    Raises:
        ValueError: more than one argument, or a value that is not a budget.
    """
    arguments = {"values": values, "keep_tokens": keep_tokens, "keep_ratio": keep_ratio}
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"Both {' and '.join(given)} are given; give one of them.")
    if keep_tokens is not None:
        return [Budget(keep_tokens=count) for count in _listed(keep_tokens)]
    if keep_ratio is not None:
        return [Budget(keep_ratio=ratio) for ratio in _listed(keep_ratio)]
    return None if values is None else [_budget(value) for value in _listed(values)]


def check_number(given: Sequence[Budget], num_stages: int) -> None:
    """Check that there is one budget per stage.

    Raises:
        ValueError: another number of budgets.
    """
    if len(given) != num_stages:
        raise ValueError(
            f"The plan has {counted(num_stages, 'stage')}, got {counted(len(given), 'budget')}; give one each, such as "
            f"keep_tokens=[64, 32] for two stages."
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _budget(value: Any) -> Budget:
    if isinstance(value, Budget):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"A budget is a count, a ratio or a tpcompress.Budget, got {value!r}; e.g. keep_tokens=64.")
    return Budget(keep_tokens=value) if isinstance(value, int) else Budget(keep_ratio=value)
