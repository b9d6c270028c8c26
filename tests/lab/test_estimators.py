import csv
import io
import json

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from tpcompress.evaluation.engine import bench as engine
from tpcompress.evaluation.engine.cell import Cell
from tpcompress.evaluation.engine.plans import FreePruner
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.insertion.plan import Budget
from tpcompress.lab.estimators.catalogue import ESTIMATORS, SCORER, Estimator, find_estimator, learns
from tpcompress.lab.estimators.cells import cells_of, run_of
from tpcompress.lab.estimators.config import EstimatorTable
from tpcompress.lab.estimators.report import EstimatorReport
from tpcompress.lab.estimators.run import run_estimators
from tpcompress.lab.estimators.toy_run import ENOUGH, Look, train_scorer, untrained
from tpcompress.lab.estimators.toy_task import KEEP, TOKENS
from tpcompress.lab.estimators.write import print_report, report_markdown, tables_of
from tpcompress.pruners import create
from tpcompress.pruners.registry import create_part
from tpcompress.training.diagnostics import estimator_results as marks
from tpcompress.training.diagnostics.estimator_results import FILE, mark_of, write_marks
from tpcompress.training.diagnostics.estimator_results import training_of as word_for

CHANCE = KEEP / TOKENS
QUICK = ("soft value", "soft noise", "hard log_bias", "trial")
"""One of each kind; the default run looks at these after 60 steps."""
LEARNING = [name for name in ESTIMATORS if learns(name)]


# ------------------------------------------------------------------------------------------------ what learns


@pytest.mark.parametrize("name", QUICK)
def test_what_is_marked_as_learning_learns(name):
    assert learns(name)
    (look,) = train_scorer(find_estimator(name), seed=0, steps=(60,))
    assert look.accuracy >= ENOUGH
    assert look.recall >= ENOUGH


def test_gathered_straight_through_from_nothing_learns_to_drop_what_is_needed():
    """The known anti-selection: only retained tokens have a gradient, so the useful ones take the blame."""
    (look,) = train_scorer(find_estimator("cold gathered"), seed=0, steps=(60,))
    assert look.recall < 0.6 * CHANCE
    assert not learns("cold gathered")


def test_a_scorer_that_was_not_trained_knows_nothing():
    """The control of the two tests above: it is training that lifts and lowers recall."""
    torch.manual_seed(0)
    look = untrained(find_estimator("soft value").pruner())
    assert abs(look.recall - CHANCE) < 0.1
    assert not look.enough


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", LEARNING)
def test_everything_marked_as_learning_learns(name, seed):
    assert train_scorer(find_estimator(name), seed)[-1].enough


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in LEARNING])
def test_nothing_marked_otherwise_learns(name):
    assert not all(train_scorer(find_estimator(name), seed)[-1].enough for seed in (0, 1))


def test_training_repeats_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    noisy = find_estimator("soft noise")
    runs = [train_scorer(noisy, seed, steps=(2, 4)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert [look.step for look in runs[0]] == [2, 4]
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ the list


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_made_of_parts_and_losses_that_exist(name):
    estimator = ESTIMATORS[name]
    create_part("selector", dict(estimator.selector))
    applier = create_part("applier", dict(estimator.applier))
    assert applier.full_length == (estimator.full_every > 0)  # gates that want the whole sequence get it
    pruner = create(estimator.pruner())
    assert create(pruner.config()).config() == pruner.config()
    losses = estimator.make_losses()
    assert [type(loss).__name__ for loss in losses] == [one["class_path"] for one in estimator.recipe_losses()]


def test_a_mix_takes_turns():
    mix = find_estimator("mix value")
    assert [mix.full_length(step) for step in range(5)] == [True, False, False, False, True]
    assert not any(find_estimator("cold gathered").full_length(step) for step in range(5))
    with pytest.raises(ValueError, match="No estimator 'mixed'; known: soft value"):
        find_estimator("mixed")


# ------------------------------------------------------------------------------------------------ marks


def test_every_estimator_has_a_mark():
    entries = json.loads(FILE.read_text())
    assert {entry["estimator"] for entry in entries} == set(ESTIMATORS)
    for entry in entries:
        estimator = ESTIMATORS[entry["estimator"]]
        named = (estimator.selector["type"], estimator.applier["type"], estimator.training)
        assert (entry["selector"], entry["applier"], entry["training"]) == named
        assert (entry["mark"] == "learns") == (min(*entry["accuracy"], *entry["recall"]) >= ENOUGH)


def test_marks_are_asked_by_names():
    assert mark_of("straight_through", "gather_value", 0) == "does not learn"
    assert mark_of("soft_topk", "value", 1) == "learns"
    assert mark_of("soft_topk", "gather_value", 0) == "unknown"
    assert [word_for(n) for n in (0, 1, 4)] == ["gathered", "full length", "mixed"]


def test_of_equal_names_the_worse_mark_counts(tmp_path, monkeypatch):
    entry = {"selector": "a", "applier": "b", "training": "mixed"}
    write_marks([entry | {"mark": m} for m in ("learns", "does not learn", "learns")], tmp_path / "marks.json")
    monkeypatch.setattr(marks, "FILE", tmp_path / "marks.json")
    marks._marks.cache_clear()
    try:
        assert mark_of("a", "b", 2) == "does not learn"
        assert mark_of("soft_topk", "value", 1) == "unknown"
    finally:
        marks._marks.cache_clear()


# ------------------------------------------------------------------------------------------------ the command


def write_config(folder, **values):
    path = folder / "estimators.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


TINY = {
    "estimators": ["soft noise", "mix value"], "steps": [1, 2], "seeds": [0], "scorers": {"blind": "local_global"},
    "budgets": [16, 9], "num_images": 4, "free": ["uniform", {"pruner": "random", "seeds": [0, 1]}, "pool"],
    "recipe": {
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "data": {
            "class_path": "BenchmarkData",
            "init_args": {"num_train": 4, "num_val": 0, "batch_size": 2, "num_workers": 0},
        },
    },
}  # fmt: skip


def test_the_shipped_file_is_read():
    measuring = EstimatorTable.from_file("recipes/tiny_llava/estimators.yaml")
    assert {estimator.name for estimator in measuring.on_toy()} == set(ESTIMATORS)
    cells = cells_of(measuring)
    assert len({cell.name for cell in cells}) == len(cells)
    rules = [rule.name for rule in measuring.free if rule.selects]
    assert {"random", "uniform", "divprune", "novelty", "cdpruner"} <= set(rules)
    assert "pool" not in rules


def test_a_run_on_the_base_trains_the_scorer_alone_by_the_estimator():
    measuring = EstimatorTable.from_file("recipes/tiny_llava/estimators.yaml")
    run = run_of(measuring, find_estimator("gumbel log_bias"), "question", 3)
    assert run.recipe["model"]["train"] == []
    assert run.recipe["model"]["pruner_phase"]["full_every"] == 1
    assert [loss["class_path"] for loss in run.recipe["model"]["pruner_phase"]["losses"]] == ["Label", "OnBudget"]
    assert run.plan.reads_prompt
    assert run.plan.stages[0].keep_tokens == measuring.trained_at
    assert run.seed == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"estimators": ["soft"]}, "No estimator 'soft'; known: soft value"),
        ({"step": [60]}, "unexpected keyword argument 'step'; known keys: base, out"),
        ({"steps": [60, 20]}, r"steps are rising counts such as \[60, 240\], got \[60, 20\]"),
        ({"free": [{"pruner": "random", "seed": 0}]}, "free: unknown key seed; known keys: pruner"),
    ],
)
def test_files_that_cannot_be(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        EstimatorTable.from_file(write_config(tmp_path, **values))


def test_a_table_from_end_to_end_is_interrupted_and_goes_on(tmp_path, monkeypatch):
    config, folder = write_config(tmp_path, **TINY), tmp_path / "out"
    console = Console(file=io.StringIO(), width=200)
    made, make = [], engine.Bench._try

    def stopped(self, cell: Cell, cells):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(cell.name)
        return make(self, cell, cells)

    monkeypatch.setattr(engine.Bench, "_try", stopped)
    with pytest.raises(KeyboardInterrupt, match="Interrupted; 4 of 16 cells are kept in .*, the same command goes on"):
        run_estimators(config, str(folder), None, console)
    first = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    assert len(first) == 4
    monkeypatch.setattr(engine.Bench, "_try", make)
    report = run_estimators(config, str(folder), str(tmp_path / "marks.json"), console)
    assert all(path.stat().st_mtime_ns == when for path, when in first.items())
    # 2 on the task; dense, and 4 rules at 2 budgets; 2 estimators at 2 budgets.
    assert len(report.records) == 2 + 1 + 8 + 4
    assert len(list((folder / "train").iterdir())) == 2
    assert {entry["estimator"] for entry in json.loads((tmp_path / "marks.json").read_text())} == set(
        TINY["estimators"]
    )
    lines = json.loads((folder / "report.json").read_text())["lines"]
    random = [line for line in lines if line["row"] == "random"]
    assert [line["seeds"] for line in random] == [2, 2]
    assert all(line["over_free"] is not None for line in lines if line["table"] == "base")
    assert len(list(csv.DictReader((folder / "report.csv").open()))) == len(lines)
    assert "| soft noise |" in (folder / "report.md").read_text()
    # Nothing is left to do, and other settings are not mixed in.
    monkeypatch.setattr(engine.Bench, "_try", lambda *_: pytest.fail("a cell was made twice"))
    run_estimators(config, str(folder), None, console)
    with pytest.raises(ValueError, match=r"another setting \(plan\); remove that folder"):
        run_estimators(write_config(tmp_path, **(TINY | {"trained_at": 9})), str(folder), None, console)


# ------------------------------------------------------------------------------------------------ the report


def answers(right: float, images: int = 200, seed: int = 0) -> Scores:
    """One family, one question an image, a share of them right."""
    count = np.ones((images, 1))
    hit = (np.random.default_rng(seed).permutation(images) < round(right * images)).astype(float)[:, None]
    return Scores(("exist",), count, {"accuracy": (hit, count)})


def record(table: str, row: str, seed=None, keep: int = 16, column: str = "", **more):
    name = f"{table}-{row}-{column}-{keep}-{seed}"
    return {"name": name, "table": table, "row": row, "column": column, "seed": seed, "keep": keep} | more


def looked(name: str, seed: int, *accuracy: float):
    looks = [{"step": 60 * (i + 1), "accuracy": a, "recall": a, "enough": a >= ENOUGH} for i, a in enumerate(accuracy)]
    return record("retrieval", name, seed, 0, looks=looks)


def made_report() -> EstimatorReport:
    shares = {"dense": 0.98, "uniform": 0.5, "divprune": 0.8, "pool": 0.97, "soft noise": 0.9}
    records = [
        looked("soft noise", 0, 0.9, 0.99),
        looked("soft noise", 1, 0.8, 0.96),
        looked("soft scale", 0, 0.3, 0.9),
    ]
    records.append(record("free", "dense", keep=0, score=shares["dense"]))
    for row, selects in (("uniform", True), ("divprune", True), ("pool", False)):
        records.append(record("free", row, score=shares[row], selects=selects))
    records += [record("base", "soft noise", seed, 16, "blind", score=shares["soft noise"]) for seed in (0, 1)]
    scores = {r["name"]: answers(shares[r["row"]]) for r in records if r["row"] in shares and r["table"] != "retrieval"}
    return EstimatorReport(records, scores, {"base": "tiny"})


def test_lines_are_means_with_intervals_and_paired_differences():
    lines = {(x.table, x.row, x.step): x for x in made_report().lines}
    task = lines["retrieval", "soft noise", 120]
    assert (task.seeds, task.score, task.worst) == (2, pytest.approx(0.975), 0.96)
    base = lines["base", "soft noise", 0]
    assert base.score == pytest.approx(0.9)
    assert 0.02 < base.ci95 < 0.06  # 1.96 sqrt(0.9 0.1 / 200) = 0.042
    # Against the best rule that selects: divprune, not pool.
    delta, low, high = base.over_free
    assert delta == pytest.approx(0.1)
    assert low < delta < high
    assert base.under_dense[0] == pytest.approx(-0.08)
    assert lines["free", "dense", 0].under_dense is None


def test_marks_ask_every_seed():
    found = {entry["estimator"]: entry for entry in made_report().marks()}
    assert found["soft noise"]["mark"] == "learns"
    assert found["soft scale"]["mark"] == "does not learn"
    assert found["soft noise"]["accuracy"] == [0.99, 0.96]
    assert (found["soft scale"]["applier"], found["soft scale"]["training"]) == ("scale", "full length")


def test_findings_name_what_fails_and_what_is_best():
    text = " ".join(made_report().findings())
    assert "1 of 2 estimators train a scorer from scratch in 120 steps" in text
    assert "not: soft scale." in text
    assert "at 16 tokens: dense" not in text
    assert "pool 97.0, divprune 80.0, uniform 50.0" in text
    assert "best on this base is soft noise with 90.0 %, +10.0 [" in text


def test_markdown_and_terminal_have_the_same_tables():
    report, out = made_report(), io.StringIO()
    print_report(report, Console(file=out, width=250))
    markdown, printed = report_markdown(report), " ".join(out.getvalue().split())
    for table in tables_of(report):
        assert table.title in printed  # over a narrow table it is broken in two
        assert f"## {table.title}" in markdown
        for row in table.rows:
            assert len(row) == len(table.header)
            assert "| " + " | ".join(row) + " |" in markdown
    assert len(tables_of(report)) == 3


def test_a_rule_knows_whether_it_selects():
    assert FreePruner("divprune").selects
    assert not FreePruner({"type": "merged", "proportional": True}, label="by size").selects
    assert FreePruner({"type": "merged"}, label="by size").name == "by size"
    assert FreePruner("random").plan(Budget(keep_tokens=9), 3).stages[0].pruner.seed == 3


def test_looks_need_both():
    assert Look(60, 0.96, 0.95).enough
    assert not Look(60, 0.96, 0.94).enough
    assert Estimator("x", {"type": "topk"}, {"type": "gather"}).pruner()["scorer"] == SCORER
