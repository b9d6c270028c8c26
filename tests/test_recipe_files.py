"""Recipes that include others: what is merged, what is replaced, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tpcompress.bundled import find_config, recipes_folder
from tpcompress.insertion.plan import PruningPlan
from tpcompress.recipe_files import merge_recipes, read_recipe
from tpcompress.training.recipe.run import RecipeCLI
from tpcompress.training.renamed import check_names

SHARED = """\
trainer: {max_steps: 9, gradient_clip_val: 1.0}
model: {train: [projector], plan: {pruner: dart, keep_tokens: 64, layer: 2}, losses: [Label]}
data: {class_path: BenchmarkData, init_args: {num_train: 8, batch_size: 2}}
"""
OWN = """\
include: parts/shared.yaml
trainer: {max_steps: 3, accelerator: cpu}
model: {base: tiny_llava, plan: {pruner: pool, keep_tokens: 16}}
data: {init_args: {batch_size: 4}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/shared.yaml").write_text(SHARED)
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path / "own.yaml"


def test_own_settings_are_laid_over_included_ones(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parents[1])  # included files are found from the recipe's folder
    assert read_recipe(recipe) == {
        "trainer": {"max_steps": 3, "gradient_clip_val": 1.0, "accelerator": "cpu"},
        "model": {
            "base": "tiny_llava", "train": ["projector"], "losses": ["Label"],
            "plan": {"pruner": "pool", "keep_tokens": 16},
        },
        "data": {"class_path": "BenchmarkData", "init_args": {"num_train": 8, "batch_size": 4}},
    }  # fmt: skip
    assert PruningPlan.of(recipe).stages[0].pruner.name == "pool"
    for config in (["--config", str(recipe)], [f"--config={recipe}"]):
        run = RecipeCLI([*config, "--trainer.max_steps", "5"], progress=False, run=False)
        assert (run.trainer.max_steps, run.trainer.gradient_clip_val, run.datamodule.batch_size) == (5, 1.0, 4)
        assert run.config.data.init_args.num_train == 8


def test_a_class_of_another_name_takes_none_of_the_arguments() -> None:
    base = {"data": {"class_path": "A", "init_args": {"x": 1}}}
    assert merge_recipes(base, {"data": {"class_path": "B"}}) == {"data": {"class_path": "B"}}
    assert merge_recipes(base, {"data": None}) == {"data": None}
    assert base == {"data": {"class_path": "A", "init_args": {"x": 1}}}


def test_what_cannot_be_included(recipe: Path) -> None:
    shared = recipe.parent / "parts/shared.yaml"
    for text, kind, message in (
        ("include: [../own.yaml]", ValueError, "includes itself by"),
        ("include: [gone.yaml]", FileNotFoundError, "No configuration file at gone.yaml"),
        ("- 1", ValueError, "is not a mapping of settings"),
        ("model: {teacher: Copy}", ValueError, "Copy is now FrozenCopy"),
    ):
        shared.write_text(text)
        with pytest.raises(kind, match=message):
            check_names(["--config", str(recipe)])


def test_bundled_recipes_are_included_and_found_where_they_were() -> None:
    for path in recipes_folder().rglob("*.yaml"):
        assert "include" not in (read_recipe(path) or {})
    for name in ("ddp", "fsdp2", "zero2", "zero3"):
        assert Path(find_config(f"recipes/llava15_7b/{name}.yaml")).parent.name == "gpus"
        assert yaml.safe_load(Path(find_config(f"recipes/gpus/{name}.yaml")).read_text())["trainer"]["devices"] == -1
