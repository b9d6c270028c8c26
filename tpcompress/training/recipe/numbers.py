"""Whole numbers of a recipe stay whole: `limit_train_batches: 1` is one batch, 1.0 is all of them."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any, Union, get_args, get_origin

import jsonargparse


def integers_first(parser: jsonargparse.ArgumentParser) -> None:
    """Let options that take `int` or `float` try `int` first.

    Python caches unions without regard to order: if another package has spelt `Union[float, int]` before Lightning is
    imported, Lightning's `Optional[Union[int, float]]` is that one, and jsonargparse turns 1 into 1.0.

    Args:
        parser: parser with the options; changed in place.
    """
    for action in parser._actions:
        hint: Any = getattr(action, "_typehint", None)
        types = get_args(hint)
        if get_origin(hint) is Union and int in types and float in types and types.index(float) < types.index(int):
            others = [kind for kind in types if kind not in (int, float)]
            action._typehint = reduce(operator.or_, [int, float, *others])  # type: ignore[attr-defined]
