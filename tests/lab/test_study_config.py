"""What the cells of a study are, and studies that cannot be."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import yaml
from lab.small_study import SHIPPED, place, small

from tpcompress.lab.study.cells import CONTROL, FREE, StudyCell, cells_of, merged
from tpcompress.lab.study.config import Ablation, Contender, Study
from tpcompress.training.recipe.run import RecipeCLI

# ---------------------------------------------------------------------------------------------------- cells


@pytest.fixture(scope="module")
def shipped() -> Study:
    return Study.from_file(SHIPPED)


@pytest.fixture(scope="module")
def shipped_cells(shipped: Study) -> list[StudyCell]:
    return cells_of(shipped)


def test_the_shipped_study_has_all_it_promises(shipped, shipped_cells):
    cells = shipped_cells
    pruners, budgets, ways, seeds = map(len, (shipped.contenders, shipped.budgets, shipped.ways, shipped.seeds))
    assert (pruners, budgets, ways, seeds) == (9, 3, 2, 3)
    assert len({cell.name for cell in cells}) == len(cells)
    assert Counter(cell.labels["table"] for cell in cells) == {
        "base": 2,
        # control and ways in every seed, dense control too; training-free once, and random in every seed
        "grid": pruners * budgets * (1 + ways) * seeds + seeds + budgets * (pruners - 1 + seeds),
        "budgets": pruners * budgets * budgets * seeds,  # the other two, and all tokens
        "pruners": pruners * (pruners - 1) * seeds,
        "ablations": len(shipped.ablations) * seeds,
    }
    runs = {run.name for cell in cells for run in cell.runs}
    assert len(runs) == pruners * budgets * ways * seeds + seeds + len(shipped.ablations) * seeds


def test_the_grid_comes_first_then_seed_by_seed_the_matrices_and_the_ablations(shipped_cells):
    order = [(cell.labels["table"], cell.labels["seed"]) for cell in shipped_cells]
    ranks = [
        {"base": 0, "grid": 1 + s, "budgets": 4 + 2 * s, "pruners": 4 + 2 * s, "ablations": 5 + 2 * s}[t]
        for t, s in order
    ]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 10


def test_a_run_needs_nothing_that_comes_later(shipped_cells):
    """Matrices reuse the runs of the grid: none trains anything that the grid has not trained."""
    grid = {run.name for cell in shipped_cells if cell.labels["table"] == "grid" for run in cell.runs}
    other = {run.name for cell in shipped_cells if cell.labels["table"] in ("budgets", "pruners") for run in cell.runs}
    assert other <= grid


def test_arms_differ_by_what_they_say_alone(shipped, shipped_cells):
    runs = {run.name: run for cell in shipped_cells for run in cell.runs}
    plain, taught = runs["in-the-loop-pool-16-seed1"], runs["in-the-loop-KL-pool-16-seed1"]
    dense = runs["dense-seed1"]
    assert plain.recipe == dense.recipe == shipped.recipe
    assert merged(plain.recipe, shipped.ways[1].recipe) == taught.recipe != plain.recipe
    assert dense.plan is None
    assert plain.plan.to_dict() == taught.plan.to_dict()


def test_a_learned_pruner_is_tested_with_its_own_weights_and_stands_in_untrained(shipped_cells):
    cells = {place(c, "way", "table", "pruner", "tested", "budget", "tested_budget", "seed"): c for c in shipped_cells}
    free = cells[FREE, "grid", "gate", "gate", None, 16, 0]
    control = cells[CONTROL, "grid", "gate", "gate", None, 16, 0]
    assert free.gate is None
    assert control.run.plan is None
    assert {c.plan.stages[0].pruner.name for c in (free, control)} == {"novelty"}
    own = cells["in the loop", "budgets", "gate", "gate", 36, 9, 2]
    assert own.gate is own.run
    foreign = cells["in the loop", "pruners", "pool", "gate", 16, 16, 2]
    assert (foreign.run.name, foreign.gate.name) == ("in-the-loop-pool-16-seed2", "in-the-loop-gate-16-seed2")


@pytest.mark.parametrize("table", ["grid", pytest.param("ablations", marks=pytest.mark.slow)])
def test_every_recipe_of_the_shipped_study_is_one(table, shipped_cells, tmp_path):
    runs = [run for cell in shipped_cells if cell.labels["table"] == table for run in cell.runs]
    recipes = {json.dumps(run.recipe): run for run in runs}
    assert len(recipes) >= 4
    for run in recipes.values():
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(run.recipe))
        plan = [] if run.plan is None else ["--model.plan", json.dumps(run.plan.to_dict())]
        args = ["--config", str(path), "--trainer.default_root_dir", str(tmp_path), *plan]
        assert (RecipeCLI(args, progress=False, run=False).model.plan is None) == (run.plan is None)


def test_recipes_merge_mapping_by_mapping_but_never_two_classes():
    below = {"model": {"train": "full", "schedule": {"class_path": "Linear", "init_args": {"start": 2}}}, "data": 1}
    above = {"model": {"schedule": {"class_path": "Constant"}, "train": ["projector"]}}
    expected = {"model": {"train": ["projector"], "schedule": {"class_path": "Constant"}}, "data": 1}
    assert merged(below, above) == expected
    assert below["model"]["train"] == "full"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"contenders": (Contender("a", "pool"), Contender("a", "uniform"))}, "contenders have a twice"),
        ({"ways": ()}, "has no ways"),
        ({"focus": 9}, "focus on one of them"),
        ({"seeds": (1, 1)}, "seeds have 1 twice"),
        ({"ablations": (Ablation("x", "pool", "loop"),)}, "no contender 'pool'; it has random, gate"),
        ({"ablations": (Ablation("x", "gate", "fast"),)}, "no way 'fast'; it has loop"),
    ],
)
def test_a_study_that_cannot_be_says_why(change, said):
    with pytest.raises(ValueError, match=said):
        small(**change)


def test_an_unknown_key_is_named(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("budget: [16]")
    with pytest.raises(ValueError, match="'budget'; known keys: base, .*recipe, contenders"):
        Study.from_file(str(path))
