"""Which plans a serving engine can take: what a servable run may train."""

from __future__ import annotations

from typing import Any

import pytest
from support import tiny_model

from tpcompress.evaluation.rank_rules import rules_for
from tpcompress.export.runtimes import Runtime, base, engines, engines_of, list_runtimes, not_servable, served_by
from tpcompress.families import resolve
from tpcompress.insertion.plan import PruningPlan
from tpcompress.pruners import create
from tpcompress.pruners.catalogue import unserved


class Engine(Runtime):
    """Serves LLaVA, and no pruner but uniform and pool."""

    name, title, serves = "engine", "Engine", True

    def refuses(self, plan: PruningPlan, config: Any) -> str | None:
        if config.model_type != "llava":
            return "it knows LLaVA only"
        return None if plan.stages[0].pruner.name in ("uniform", "pool") else "it has no such kernel"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (base, engines):
        monkeypatch.setattr(module, "list_runtimes", lambda: {"engine": Engine()})


@pytest.mark.usefixtures("engine")
def test_an_engine_decides_for_the_families_that_it_knows() -> None:
    llava = tiny_model().config
    other = type("Config", (), {"model_type": "other"})()
    uniform, divprune = PruningPlan.of("uniform:4"), PruningPlan.of("divprune:4")
    assert [each.title for each in engines_of(llava)] == ["Engine"]
    assert served_by(uniform, llava) == ["Engine"]
    assert not_servable(uniform, llava) is None
    assert not_servable(divprune, llava) == "it has no such kernel"
    assert engines_of(other) == []
    assert not_servable(divprune, other) is None, "nobody knows the family: by the plan alone"
    assert "inside the language model" in str(not_servable(PruningPlan.of("uniform:4@1"), other))
    assert "reads tower" in str(not_servable(PruningPlan.of("fastervlm:4"), other))


def test_a_servable_ranking_has_rules_before_the_language_model_alone() -> None:
    parts = resolve(tiny_model())
    rules, refused = rules_for(parts, servable=True)
    assert len(rules) > 3
    for rule in rules:
        pruner = create(rule.name)
        assert (rule.layer, unserved(pruner)) == (0, None)
        assert not pruner.uses_token_sizes
        assert not pruner.prompt_dependent
    every, _ = rules_for(parts)
    left_out = {rule.name for rule in every} - {rule.name for rule in rules}
    reasons = {each.rule: each.reason for each in refused}
    assert left_out
    assert all(reasons[name].startswith("no serving engine can take it: ") for name in left_out)


def test_transformers_is_no_serving_engine() -> None:
    assert not list_runtimes()["transformers"].serves
