"""The plans with the settings of each paper: every pruner has one, they run at the paper's depth, old paths work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tpcompress.cli.main import main
from tpcompress.families.tiny import IMAGE, tiny_text, tiny_vision
from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.plan import PruningPlan
from tpcompress.pruners import Pruner, list_pruners
from tpcompress.pruners.catalogue import groups, paper_plans, plans_of

FILES_OF_0_1 = [
    "cdpruner", "dart", "dart_input", "divprune", "dtd", "eadp", "fastervlm", "fastv", "hiprune", "holov",
    "merged_divprune", "mix", "novelty", "pool", "prumerge", "prumerge_plus", "pyramiddrop", "quota", "random",
    "restore_divprune", "scope", "sieve", "sparsevlm", "tofu", "tome", "tops", "uniform", "visionzip", "vispruner",
    "vtw", "window_fastv",
]  # fmt: skip
"""Plans that 0.1.0 kept as `recipes/free/NAME.yaml`."""


@pytest.fixture(scope="module")
def deep() -> LlavaForConditionalGeneration:
    """LLaVA-1.5's shape in little: 576 vision tokens, 24 tower layers, 32 decoder layers."""
    vision = tiny_vision("clip_vision_model", image_size=96, num_hidden_layers=24)
    text = tiny_text(num_hidden_layers=32)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=576)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("name", list_pruners())
def test_every_pruner_without_training_has_a_plan(name: str) -> None:
    """What learns has recipes that train it instead; a plan without a paper is optional."""
    cls, used = list_pruners()[name], set()
    for text in plans_of(cls).values():
        assert text.startswith("# "), "a comment states the setting"
        assert all(len(line) <= 125 for line in text.splitlines())
        plan = PruningPlan.from_yaml(text)
        used |= {m.name for stage in plan.stages for m in stage.pruner.modules() if isinstance(m, Pruner)}
    assert name in used or cls().learned or cls.paper == "ours"


@pytest.mark.parametrize("name", paper_plans())
def test_a_plan_runs_at_the_papers_depth(name: str, deep: LlavaForConditionalGeneration) -> None:
    plan = PruningPlan.of(f"{name}:paper")
    ids = torch.tensor([[5, 6, *[IMAGE] * 576, 7, 8, 9, 10, 11]])
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    attach(deep, plan)
    try:
        with record(deep) as trace, torch.no_grad():
            logits = deep(input_ids=ids, pixel_values=pixels).logits
    finally:
        detach(deep)
    assert torch.isfinite(logits).all()
    assert [stage.vision_out for stage in trace.stages] == [[count] for count in plan.counts(576)]


@pytest.mark.parametrize("name", FILES_OF_0_1)
def test_the_paths_of_earlier_files_still_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = PruningPlan.of(f"recipes/free/{name}.yaml")
    today = {"merged_divprune": "merged", "restore_divprune": "restore", "window_fastv": "window"}.get(name, name)
    assert plan.to_dict() == PruningPlan.of(f"{today}:paper").to_dict()


def test_a_file_of_that_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/free").mkdir(parents=True)
    (tmp_path / "recipes/free/dart.yaml").write_text("stages: [{pruner: random, keep_tokens: 5}]")
    assert PruningPlan.of("recipes/free/dart.yaml").stages[0].pruner.name == "random"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("darts:paper", "No plan 'darts:paper'; plans of papers: cdpruner, dart, .* Did you mean dart"),
        ("learned_gate:paper", "Other pruners need a budget: learned_gate:64@0"),
        ("recipes/free/gone.yaml", "No plan at recipes/free/gone.yaml"),
    ],
)
def test_a_plan_that_is_none_is_one_line(source: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as refusal:
        PruningPlan.of(source)
    assert "\n" not in str(refusal.value)


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pruners", "dart_input", "--plan"]) == 0
    assert capsys.readouterr().out == paper_plans()["dart_input"]
    assert main(["pruners", "learned_gate", "--plan"]) == 2
    assert re.search("No plan of a paper for 'learned_gate'; choose one of cdpruner, ", capsys.readouterr().err)


def test_every_pruner_is_in_one_group() -> None:
    listed = [name for names in groups().values() for name in names]
    assert sorted(listed) == sorted(list_pruners())
