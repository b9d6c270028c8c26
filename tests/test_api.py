"""The public interface: every form of a plan, budgets in one signature, pruning switched off for a block."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tpcompress as tp
from tpcompress.insertion.budget import read_budgets
from tpcompress.models import load_base
from tpcompress.pruners import create

TWO = "{stages: [{pruner: divprune, keep_tokens: 64}, {pruner: uniform, layer: 1, keep_ratio: 0.25}]}"


@pytest.fixture(scope="module")
def model() -> Any:
    return load_base("tiny_llava").eval()


@pytest.fixture
def base(model: Any) -> Any:
    yield model
    if tp.is_attached(model):
        tp.detach(model)


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, torch.Tensor]:
    image = model.config.image_token_id
    ids = torch.tensor([[1, *[image] * 144, 5, 6]])
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def stages(plan: tp.PruningPlan) -> list[tuple[str, int, float | None, int | None]]:
    return [(s.pruner.name, s.layer, s.keep_ratio, s.keep_tokens) for s in plan.stages]


def test_every_form_of_one_pruner_is_the_same_plan(tmp_path: Path) -> None:
    want = tp.PruningPlan([tp.Stage("dart", 2, keep_tokens=64)])
    yaml_file, json_file, recipe = tmp_path / "plan.yaml", tmp_path / "plan.json", tmp_path / "recipe.yaml"
    yaml_file.write_text(want.to_yaml())
    json_file.write_text(want.to_json())
    recipe.write_text("model: {base: x, plan: {pruner: dart, layer: 2, keep_tokens: 64}}")
    by_name = [
        tp.PruningPlan.of(pruner, keep_tokens=64, layer=2)
        for pruner in ("dart", {"type": "dart"}, create("dart"), "tpcompress.pruners.dart.DART")
    ]
    others = ["dart:64@2", want, want.stages[0], list(want.stages), want.to_dict(), [want.stages[0].to_dict()]]
    others += [{"pruner": "dart", "layer": 2, "keep_tokens": 64}, yaml_file, str(yaml_file), json_file, recipe]
    for plan in [*by_name, *map(tp.PruningPlan.of, others)]:
        assert plan.to_dict() == want.to_dict()


def test_short_forms_have_layers_and_ratios() -> None:
    plan = tp.PruningPlan.of("divprune:64@0, dart:0.25@8")
    assert stages(plan) == [("divprune", 0, None, 64), ("dart", 8, 0.25, None)]
    assert stages(tp.PruningPlan.of("vtw:0@16")) == [("vtw", 16, None, 0)]


def test_bundled_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stages(tp.PruningPlan.of("recipes/free/dart.yaml"))[0][0] == "dart"
    assert stages(tp.PruningPlan.of("recipes/tiny_llava/pool_full.yaml"))[0][0] == "pool"


def test_a_plan_gets_other_budgets_by_the_same_words(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(TWO)
    plan = tp.PruningPlan.of(tmp_path / "plan.yaml", keep_tokens=[32, 8])
    assert plan.counts(144) == [32, 8]
    assert tp.PruningPlan.of("divprune:64", keep_ratio=0.5).counts(144) == [72]


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("divprune", {}, "Pruner 'divprune' needs a budget; give keep_tokens or keep_ratio, or write divprune:64."),
        ("divprun", {"keep_tokens": 9}, "No pruner 'divprun'. Known: .* Did you mean divprune?"),
        ("divprun:9", {}, "No pruner 'divprun'. .* Did you mean divprune?"),
        ("divprune:many", {}, "'divprune:many' is not a plan; write PRUNER:KEEP@LAYER such as"),
        ("divprune:64;dart:9@1", {}, "is not a plan; write PRUNER:KEEP@LAYER"),
        ("gone.yaml", {}, "No plan at gone.yaml; give a pruner with a budget"),
        ("dart:64@2", {"layer": 3}, "layer=3 is for a single pruner, but a plan is given"),
        ("dart", {"keep_tokens": 9, "keep_ratio": 0.5}, "Both keep_tokens and keep_ratio are given"),
        ("dart", {"keep_tokens": [9, 4]}, "The plan has 1 stage, got 2 budgets"),
        ("dart:9,random:9@1", {"keep_tokens": 4}, "The plan has 2 stages, got 1 budget;"),
        (64, {}, "Not a plan: 64; give a pruner with a budget"),
        ({"stages": [], "colour": 1}, {}, "Unknown plan key 'colour'"),
    ],
)
def test_what_is_no_plan(source: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        tp.PruningPlan.of(source, **arguments)
    assert "\n" not in str(error.value)


def test_files_that_hold_no_plan(tmp_path: Path) -> None:
    for text, message in (("model: {base: x}", "has no model.plan"), ("just words", "holds no plan")):
        (tmp_path / "file.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            tp.PruningPlan.of(tmp_path / "file.yaml")


def test_attach_takes_every_form(base: Any, inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("{pruner: divprune, keep_tokens: 36}")
    forms: list[tuple[Any, dict[str, Any]]] = [
        ("divprune", {"keep_tokens": 36}),
        ("divprune", {"keep_ratio": 0.25}),
        ("divprune:36@0", {}),
        ({"pruner": "divprune", "keep_tokens": 36}, {}),
        (tmp_path / "plan.yaml", {}),
        (tp.PruningPlan([tp.Stage("divprune", keep_tokens=36)]), {}),
    ]
    for plan, arguments in forms:
        assert tp.attach(base, plan, **arguments) is base
        with tp.record(base) as trace, torch.no_grad():
            base(**inputs)
        assert [stage.vision_out for stage in trace.stages] == [[36]]
        tp.detach(base)


def test_disabled_is_the_base(base: Any, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        before = base(**inputs).logits
        tp.attach(base, "divprune", keep_tokens=9)
        with tp.disabled(base):
            assert torch.equal(base(**inputs).logits, before)
        assert base(**inputs).logits.shape[1] == before.shape[1] - 144 + 9


def test_budgets_in_every_form(base: Any, inputs: dict[str, torch.Tensor]) -> None:
    tp.attach(base, "divprune:64@0,uniform:16@1")

    def retained(*args: Any, **kwargs: Any) -> list[int]:
        with tp.budgets(base, *args, **kwargs), tp.record(base) as trace, torch.no_grad():
            base(**inputs)
        return [stage.vision_out[0] for stage in trace.stages]

    assert retained(keep_tokens=[32, 4]) == [32, 4]
    assert retained(keep_ratio=[0.5, 0.25]) == [72, 36]
    assert retained([32, 0.125]) == [32, 18]
    assert retained([tp.Budget(keep_tokens=8), tp.Budget(keep_tokens=2)]) == [8, 2]
    for arguments, message in (
        ({}, "No budget is given; give keep_tokens, keep_ratio"),
        ({"keep_tokens": 4}, "The plan has 2 stages, got 1 budget;"),
        ({"keep_tokens": [4, 2], "keep_ratio": [0.5, 0.5]}, "Both keep_tokens and keep_ratio"),
    ):
        with pytest.raises(ValueError, match=message), tp.budgets(base, **arguments):
            pass


def test_values_that_are_no_budgets() -> None:
    assert read_budgets() is None
    assert read_budgets(9) == [tp.Budget(keep_tokens=9)]
    for value in (True, "9", [None]):
        with pytest.raises(ValueError, match="A budget is a count, a ratio or a tpcompress.Budget, got"):
            read_budgets(value)  # type: ignore[arg-type]


def test_pruners_are_listed_by_pattern() -> None:
    assert set(tp.list_pruners("di*")) == {name for name in tp.list_pruners() if name.startswith("di")}
    described = tp.list_pruners("divprune", with_description=True)
    assert list(described) == ["divprune"]
    assert "farthest" in described["divprune"]
    assert tp.list_pruners("no*such*thing") == {}
    with pytest.raises(ValueError, match="No pruner 'divprun'. .* Did you mean divprune"):
        tp.list_pruners("divprun")


def test_export_is_a_function_and_a_package(base: Any, tmp_path: Path) -> None:
    import tpcompress.export.card
    from tpcompress.models import load_processor

    assert tpcompress.export.card.CARD == "README.md"
    assert tp.export is tpcompress.export
    tp.attach(base, "divprune", keep_tokens=16)
    processor = load_processor("tiny_llava")
    called = tp.export(base, processor, tmp_path / "called")
    saved = tp.save_pretrained(base, tmp_path / "saved", processor=processor)
    for folder in (called, saved):
        assert tp.verify(folder).ok
        assert tp.plan_of(tp.from_pretrained(folder, keep_tokens=9)).counts(144) == [9]
    weights = "tpcompress.safetensors"
    assert (called / weights).read_bytes() == (saved / weights).read_bytes()


def test_no_public_name_hides_a_module() -> None:
    for info in pkgutil.walk_packages(tp.__path__, "tpcompress."):
        if not info.name.endswith("__main__"):
            module = importlib.import_module(info.name)
            package, _, name = info.name.rpartition(".")
            assert getattr(sys.modules[package], name) is module, f"{info.name} is hidden in {package}"


def test_public_names_of_evaluation_are_lazy_and_whole() -> None:
    import tpcompress.evaluation as evaluation

    assert sorted(evaluation.MODULES) == sorted(evaluation.__all__)
    for name in evaluation.__all__:
        value = getattr(evaluation, name)
        assert callable(value)
        assert value.__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = evaluation.no_such_name
