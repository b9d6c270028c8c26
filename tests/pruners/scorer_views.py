"""Scorers and the views that their tests show them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import config_id, make_view, scramble
from torch import Tensor, nn

from tpcompress.pruners import TokenView
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.registry import create_part, list_parts

D = 16


CONFIGS = [{"type": name, **more} for name, cls in list_parts("scorer").items() for more in ({}, *cls.test_arguments)]


LEARNED = [config for config in CONFIGS if create_part("scorer", dict(config)).learned]


READERS = [config for config in LEARNED if "text" in create_part("scorer", dict(config)).needs]


GRIDS = {1: (1, 1), 12: (3, 4), 35: (5, 7)}


every_scorer = pytest.mark.parametrize("config", CONFIGS, ids=config_id)


every_learner = pytest.mark.parametrize("config", LEARNED, ids=config_id)


every_reader = pytest.mark.parametrize("config", READERS, ids=config_id)


def make(config: dict[str, Any], fresh: bool = False) -> Any:
    scorer = create_part("scorer", dict(config))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scorer.build(D)
    return (scorer if fresh else scramble(scorer)).eval()


def features(B: int, V: int, seed: int = 0) -> Tensor:
    rows = [torch.randn(V, D, generator=torch.Generator().manual_seed(seed + 100 * b)) for b in range(B)]
    return torch.stack(rows)


def view_of(scorer: Any, B: int = 3, V: int = 12) -> TokenView:
    return view_over(scorer, features(B, V))


def view_over(scorer: Any, vision_BVD: Tensor) -> TokenView:
    view = make_view(scorer, vision_BVD, GRIDS[vision_BVD.shape[1]])
    return view if view.text_BSD is None else in_sequence(view)


def in_sequence(view: TokenView, before: int = 3) -> TokenView:
    """The same view with its vision tokens behind the first words of the sequence, as a model shows them."""
    B, V, _ = view.vision_BVD.shape

    def spliced(words: Tensor, vision: Tensor) -> Tensor:
        return torch.cat([words[:, :before], vision, words[:, before:]], 1)

    assert view.text_BSD is not None
    fields = {name: getattr(view, name) for name in ("text_role_BS", "text_valid_BS")}
    nothing = {name: value.new_zeros(B, V) for name, value in fields.items()}
    more = {name: spliced(value, nothing[name]) for name, value in fields.items()}
    more["text_BSD"] = spliced(view.text_BSD, view.vision_BVD)
    return replace(view, column_BV=(before + torch.arange(V)).expand(B, V), **more)


def pad_words(view: TokenView, left: int, right: int) -> TokenView:
    """The same view in a batch with a longer sequence; the padding is loud garbage."""
    fields = {
        name: F.pad(getattr(view, name), (0, 0, left, right) if name.endswith("D") else (left, right), value=value)
        for name, value in {"text_BSD": 1e3, "text_role_BS": 0, "text_valid_BS": False}.items()
    }
    return replace(view, column_BV=view.column_BV + left, **fields)


def wordless(view: TokenView) -> TokenView:
    assert view.text_role_BS is not None
    assert view.text_valid_BS is not None
    return replace(
        view, text_role_BS=torch.zeros_like(view.text_role_BS), text_valid_BS=torch.zeros_like(view.text_valid_BS)
    )


def total(scores: Scores, seed: int = 0) -> Tensor:
    """A random linear function of everything that a scorer answered."""
    g = torch.Generator().manual_seed(seed)
    given = [x for x in (scores.scores_BV, scores.text_BSD, scores.votes_BVV) if x is not None]
    return sum(((x * torch.randn(x.shape, generator=g)).sum() for x in given), torch.zeros(()))


def dead_weights(scorer: nn.Module, view: TokenView) -> list[str]:
    """Weights that no gradient reaches."""
    scorer.zero_grad()
    total(scorer.train()(view)).backward()
    return [name for name, p in scorer.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
