"""What all pruners made of pruners promise."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from exact import check
from pruners.test_quotas import D, view_over
from support import batch
from torch import Tensor

from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.pruners import Pruner, Selection, TokenView, create
from tpcompress.pruners.combinators import Composed
from tpcompress.pruners.mix import normalise
from tpcompress.pruners.topk import keep_topk

CONFIGS: list[dict[str, Any]] = [
    {"type": "window"},
    {"type": "window", "pruner": {"type": "dart", "vision_pivots": 2}, "rows": 2, "cols": 3},
    {"type": "quota", "per": "image", "share": "proportional"},
    {"type": "quota", "pruner": {"type": "window", "pruner": {"type": "novelty"}, "rows": 2}},
    {"type": "mix"},
    {"type": "mix", "alpha": 1.0, "uniqueness": {"type": "novelty"}},
    {"type": "mix", "uniqueness": "last_vision", "norm": "rank", "mode": "scheduled", "alpha": 1.0, "alpha_end": 0.3},
    {"type": "mix", "importance": {"type": "random", "seed": 3}, "norm": "standard", "mode": "learned"},
]


class Ranks(Pruner):
    """Scores as given, to see what a combinator does with them."""

    name = "ranks"

    def __init__(self) -> None:
        super().__init__()
        self.scores_BV: Tensor = torch.zeros(1, 1)

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        return Selection(keep_topk(self.scores_BV, tokens.valid_BV, num_keep_B), self.scores_BV)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_plans_with_combinators_go_through_yaml(config: dict[str, Any]) -> None:
    plan = PruningPlan([Stage(config, 2, keep_tokens=9)])
    again = PruningPlan.from_yaml(plan.to_yaml())
    assert again.to_dict() == PruningPlan.from_json(plan.to_json()).to_dict() == plan.to_dict()
    pruner, loaded = plan.stages[0].pruner, again.stages[0].pruner
    for p in (pruner, loaded):
        p.build(D)
    view = view_over(pruner, (5, 7))
    counts = torch.tensor([4, 9, 30])
    expected = pruner(view, counts).keep_BV
    assert expected.sum(1).tolist() == [4, 9, 30]
    assert torch.equal(loaded(view, counts).keep_BV, expected)
    assert torch.equal(copy.deepcopy(pruner)(view, counts).keep_BV, expected)


def test_a_part_may_be_a_pruner_a_name_or_a_mapping() -> None:
    given = [create("novelty"), "novelty", {"type": "novelty"}]
    configs = [create({"type": "window", "pruner": part}).config() for part in given]
    assert configs == [{"type": "window", "pruner": {"type": "novelty"}, "rows": 4, "cols": 4}] * 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "window", "pruner": "pool"}, "window cannot build on 'pool', which merges tokens; name another"),
        (
            {"type": "quota", "pruner": {"type": "learned_gate", "applier": "merge"}},
            "quota cannot build on 'learned_gate', which merges tokens; take another selector or applier",
        ),
        (
            {"type": "merged", "pruner": {"type": "learned_gate", "selector": "threshold", "applier": "value"}},
            "merged cannot build on 'learned_gate', which chooses its own count; take another selector",
        ),
        ({"type": "mix", "importance": "learned_gate", "norm": "rank"}, "mix with norm: rank passes no gradient"),
        ({"type": "mmr", "alpha": 1.5}, "mmr needs alpha in .0, 1."),
        ({"type": "mmr", "feature": "pixels"}, "mmr has no feature 'pixels'; choose one of tokens, keys, tower"),
        ({"type": "mmr", "per_round": 0}, "mmr picks at least one token per round"),
        ({"type": "window", "pruner": {"type": "dart", "compat": "llava"}}, "on 'dart', which chooses its own count"),
        ({"type": "mix", "importance": "vtw"}, "mix cannot build on 'vtw', which retains nothing"),
        ({"type": "window", "pruner": "fastw"}, "No pruner 'fastw'. Known: .* Did you mean fastv?"),
        ({"type": "window", "pruner": "torch.nn.Linear"}, "outside tpcompress"),
        ({"type": "mix", "uniqueness": {"type": "torch.nn.Linear"}}, "'torch.nn.Linear' is not a Pruner"),
        ({"type": "window", "rows": 0}, "window cuts into rows and cols of at least 1, got 0 x 4"),
        ({"type": "quota", "per": "video"}, "quota has no group 'video'; choose one of tile, frame, image"),
        ({"type": "quota", "share": "fair"}, "quota has no share 'fair'; choose one of equal, proportional"),
        ({"type": "mix", "mode": "free"}, "mix has no mode 'free'"),
        ({"type": "mix", "norm": "l2"}, "mix has no norm 'l2'"),
        ({"type": "mix", "alpha": 1.5}, "mix needs alpha and alpha_end in .0, 1., .* got 1.5, 0.5"),
        ({"type": "mix", "mode": "learned", "alpha": 1.0}, "alpha inside it to be learned; got 1.0"),
        ({"type": "mix", "temperature_end": 0.0}, "mix needs 0 < temperature_end <= temperature_start"),
    ],
)
def test_refused_values(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        create(config)
    assert "\n" not in str(error.value)


class TowerAt(Pruner):
    """Reads one layer of the tower."""

    name = "tower_at"
    layers: ClassVar[tuple[int, ...]]

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"tower_cls"})

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return (self.layer,)

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        assert tokens.tower_cls_BLHV.shape[1] == 1
        scores_BV = tokens.tower_cls_BLHV[:, 0].mean(1)
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)


def test_each_part_gets_its_own_layers_of_the_tower() -> None:
    pruner = create("mix")
    both = type(pruner)(TowerAt(3), TowerAt(-2), alpha=0.5)
    assert both.tower_layers == (3, -2)
    assert type(pruner)(TowerAt(3), "novelty").tower_layers == (3,), "a rule without a tower asks for no layer of it"
    assert type(pruner)("fastv", "novelty").tower_layers == (-2,)
    view = view_over(both, (5, 7))
    scores = both(view, torch.tensor([3, 4, 5])).scores_BV
    parts = [normalise(view.tower_cls_BLHV[:, n].mean(1), view.valid_BV, "minmax") for n in (0, 1)]
    assert torch.allclose(scores, (parts[0] + parts[1]) / 2)


def test_what_depends_on_the_prompt() -> None:
    depends = {
        str(config): create(config).prompt_dependent
        for config in (
            {"type": "window"},
            {"type": "window", "pruner": "novelty"},
            {"type": "mix", "importance": "novelty", "uniqueness": "last_prompt"},
            {"type": "mix", "importance": "novelty", "uniqueness": "last_vision"},
            {"type": "mix", "uniqueness": "last_vision", "alpha": 0.0},
        )
    }
    assert list(depends.values()) == [True, False, True, False, False]


def test_parts_are_told_of_width_and_progress() -> None:
    class Told(Ranks):
        heard: ClassVar[list[Any]] = []

        def build(self, hidden_size: int) -> None:
            self.heard.append(hidden_size)

        def set_progress(self, progress: float) -> None:
            self.heard.append(progress)

    for pruner in (type(create("window"))(Told()), type(create("mix"))(Told())):
        pruner.build(D)
        pruner.set_progress(0.25)
    assert Told.heard == [D, 0.25, D, 0.25]
    assert isinstance(create("window"), Composed)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("scope", ["image", "prompt"])
def test_inside_a_model(model: Any, base: Any, config: dict[str, Any], scope: str) -> None:
    plan = PruningPlan([Stage(config, 2, keep_tokens=13)], scope=scope)
    check(model, base, plan, batch([(5, 1, 7), (3, 2, 8)]))
