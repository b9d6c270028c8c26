"""Selectors and the scores that their tests give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import config_id
from torch import Tensor

from tpcompress.pruners.gate_components import Choice, Scores, Selector
from tpcompress.pruners.registry import create_part, list_parts
from tpcompress.pruners.selectors.relaxations import (
    RELAXATIONS,
)
from tpcompress.pruners.topk import standardise

CONFIGS = [{"type": name, **more} for name, cls in list_parts("selector").items() for more in ({}, *cls.test_arguments)]


D = 8


every_selector = pytest.mark.parametrize("config", CONFIGS, ids=config_id)


every_relaxation = pytest.mark.parametrize("relaxation", RELAXATIONS)


def made(config: str | dict[str, Any]) -> Selector:
    selector = create_part("selector", config)
    selector.build(D)
    return selector


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Row b of the first dimension is the same whatever is around it."""
    rows = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed + 100 * b)) for b in range(shape[0])]
    return torch.stack(rows)


def scored(B: int, V: int, valid_BV: Tensor | None = None, seed: int = 0) -> tuple[Scores, Tensor]:
    """Standardised scores that want a gradient, votes for all, and what is valid."""
    valid_BV = torch.ones(B, V, dtype=torch.bool) if valid_BV is None else valid_BV
    scores_BV = standardise(draw(B, V, seed=seed), valid_BV).requires_grad_()
    return Scores(scores_BV, votes_BVV=draw(B, V, V, seed=seed + 1).requires_grad_()), valid_BV


def choose(
    selector: Selector, scores: Scores, valid_BV: Tensor, counts: list[int], explore: bool, seed: int = 0
) -> Choice:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        choice: Choice = selector(scores, valid_BV, torch.tensor(counts), explore)
    return choice


def is_noisy(selector: Selector) -> bool:
    """Exploring, it draws."""
    scores, valid = scored(2, 30)
    one, two = (choose(selector, scores, valid, [7, 9], True, seed) for seed in (0, 1))
    same = torch.equal(one.keep_BV, two.keep_BV)
    return not (same and (one.gate_BV is None or torch.equal(one.gate_BV, two.gate_BV)))
