"""Which runtimes can run a plan, and why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tpcompress as tp
from tpcompress.export.runtimes import Runtime, list_runtimes, report, runtime_lines, runtimes_of, vllm
from tpcompress.export.runtimes.vllm import served_types
from tpcompress.families import list_families
from tpcompress.pruners import list_pruners
from tpcompress.pruners.catalogue import unserved

LEARNED_COUNT = {"type": "learned_gate", "selector": {"type": "threshold"}}
PLANS: dict[str, Any] = {
    "a fixed count": ("divprune:8@0", {}, None),
    "a ratio": ("divprune:0.5@0", {}, None),
    "a later stage": ("divprune:0.5@0,divprune:8@2", {}, "stage 1 acts at layer 2, inside the language model"),
    "the prompt": ("cdpruner:8@0", {}, "'cdpruner' reads the prompt"),
    "own counts": ({"pruner": LEARNED_COUNT, "keep_tokens": 8}, {}, "'learned_gate' chooses its own count"),
    "views": ("visionzip:8@0", {}, "'visionzip' reads projector, tower_cls, tower_keys"),
    "sizes": ("tome:8@0", {}, "'tome' returns sizes or positions"),
    "budgets per prompt": ("divprune:8@0", {"scope": "prompt"}, "the budget holds per prompt"),
}  # fmt: skip


def config_of(family: str) -> Any:
    return list_families()[family].tiny.config()


@pytest.mark.parametrize("what", PLANS)
def test_engines_take_plans_of_the_encoder(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "served_types", lambda: ("llava",))
    source, policies, reason = PLANS[what]
    plan = tp.PruningPlan.from_dict(tp.PruningPlan.of(source).to_dict() | {"positions": "compact"} | policies)
    found = runtimes_of(plan, config_of("llava"))
    assert found["transformers"] is None
    if reason is None:
        assert found["vllm"] is None
    else:
        assert found["vllm"] is not None
        assert found["vllm"].startswith(reason)


@pytest.mark.parametrize("family", list_families())
def test_vllm_names_families_without_an_adapter(family: str) -> None:
    plan = tp.PruningPlan.of("divprune:8@0")
    reason = list_runtimes()["vllm"].refuses(plan, config_of(family))
    if config_of(family).model_type in served_types():
        assert reason is None or "has no vLLM class" not in reason
    else:
        assert reason is not None
        assert reason.startswith(f"model type {config_of(family).model_type} has no vLLM class")


def test_vllm_needs_no_view_of_the_tower() -> None:
    for name, cls in list_pruners().items():
        budget = 0 if cls.keeps_none else 8
        if cls().needs and unserved(cls()) is None:
            plan = tp.PruningPlan.of(name, keep_tokens=budget)
            assert "vision tower" in (list_runtimes()["vllm"].refuses(plan, config_of("llava")) or "")


def test_every_file_has_one_runtime_with_a_reason_in_one_line() -> None:
    plan = tp.PruningPlan.of("divprune:8@2")
    assert {"transformers", "vllm"} <= list_runtimes().keys()
    for name, runtime in list_runtimes().items():
        assert isinstance(runtime, Runtime)
        assert name == name.lower()
        reason = runtime.refuses(plan, config_of("llava"))
        assert reason is None or ("\n" not in reason and reason[0].islower() and not reason.endswith("."))


def test_the_lines(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    assert manifest["runtimes"].keys() == list_runtimes().keys()
    assert runtime_lines(exported) == report(manifest["runtimes"])
    assert "transformers: yes" in runtime_lines(exported)
    assert "vLLM: no, stage 1 acts at layer 3, inside the language model" in runtime_lines(exported)
    assert report({"later": None}) == ["later: yes"]
    for line in runtime_lines(exported):
        assert f"- {line}." in (exported / "README.md").read_text()
