"""Equal tokens tie: neither padding, nor the batch, nor rounding tells them apart."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from pruners.test_contract import token_fields
from support import config_id, make_pruner, make_view, pad_view, pruner_configs, view_rows
from torch import Tensor

from tpcompress.pruners import TokenView

D = 16
RULES = (
    "dart", "mix", "divprune", "cdpruner", "scope", "tops", "eadp", "sieve", "dtd", "novelty", "mmr", "vidcom2",
    "hired", "globalcom2", "mustdrop",
)  # fmt: skip
CONFIGS = [config for config in pruner_configs() if config["type"] in RULES and "learned_gate" not in str(config)]
"""Without learned gates, whose scorer sees where a token stands."""


def view_of(config: dict[str, Any], kinds: Tensor, seed: int) -> TokenView:
    """Three rows of tokens of some kinds, alike in everything that the pruner reads."""
    rule = make_pruner(config)
    V = len(kinds)
    view = make_view(rule, torch.randn(3, V, D, generator=torch.Generator().manual_seed(seed)), seed=seed)

    def alike(name: str, value: Tensor) -> Tensor:
        across = value.ndim - (2 if name.endswith(("VD", "VC")) else 1)
        return value.index_select(across, kinds)

    names = [name for name in ("vision_BVD", *token_fields(view)) if not name.startswith("input")]
    return replace(view, **{name: alike(name, getattr(view, name)) for name in names})


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            config,
            id=config_id(config),
            marks=pytest.mark.slow if config["type"] in {c["type"] for c in CONFIGS[:at]} else (),
        )
        for at, config in enumerate(CONFIGS)
    ],
)
def test_neither_padding_nor_batch_tells_equal_tokens_apart(config: dict[str, Any]) -> None:
    for V, seed in itertools.product((36, 81, 150), range(2)):
        kinds = torch.randint(0, V // 4, (V,), generator=torch.Generator().manual_seed(seed))
        view, rule, case = view_of(config, kinds, seed), make_pruner(config), f"{V} tokens, seed {seed}"
        counts = torch.tensor([V // 3, V // 2, V - 2])
        with torch.no_grad():
            whole = rule(view, counts).keep_BV
            for padding in (1, 5, 27):
                assert torch.equal(rule(pad_view(view, padding, (2, V)), counts).keep_BV[:, :V], whole), case
            for b in range(3):
                assert torch.equal(rule(view_rows(view, [b]), counts[b : b + 1]).keep_BV[0], whole[b]), case


@pytest.mark.parametrize("config", [config for config in CONFIGS if config.get("pivot") != "random"], ids=config_id)
def test_of_tokens_that_are_all_equal_the_first_stay(config: dict[str, Any]) -> None:
    for V in (13, 36, 81, 150):
        counts = torch.tensor([1, V // 3, V - 1])
        with torch.no_grad():
            keep = make_pruner(config)(view_of(config, torch.zeros(V, dtype=torch.long), 1), counts).keep_BV
        assert torch.equal(keep, torch.arange(V) < counts[:, None]), f"{V} tokens"
