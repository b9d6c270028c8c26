"""The study: what its cells are, that they survive company and interruption, and what its tables say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from tpcompress.evaluation.engine import bench as engine
from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.engine.cell import Made
from tpcompress.evaluation.engine.locks import claim
from tpcompress.evaluation.scoring.evaluate import evaluate
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.seeds import gain_of, pooled, score_of
from tpcompress.evaluation.scoring.stats import t_quantile
from tpcompress.insertion.attach import attach, budgets, plan_of
from tpcompress.insertion.plan import Budget
from tpcompress.lab.study.cells import CONTROL, DENSE, FREE, cells_of, merged
from tpcompress.lab.study.config import Ablation, Contender, Study, Way
from tpcompress.lab.study.run import open_bench, run_study
from tpcompress.lab.study.tables import BEGIN, END, fill, write_tables
from tpcompress.models import load_base
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.recipe.run import RecipeCLI, run_recipe

QUIET = Console(quiet=True)
SHIPPED = "recipes/studies/training_aware.yaml"
DATA = {"class_path": "BenchmarkData", "init_args": {"num_train": 4, "num_val": 0, "batch_size": 2}}
KL = {"teacher": "FrozenCopy", "losses": ["Label", {"class_path": "KL", "init_args": {"weight": 1.0}}]}


def small(**others) -> Study:
    """Two steps of two pictures."""
    values = {
        "recipe": {"trainer": {"max_steps": 2}, "model": {"optimizer": {"lr": 5e-4}}, "data": DATA},
        "contenders": (
            Contender("random", "random", seeded=True),
            Contender(
                "gate", "learned_gate", recipe={"model": {"train": ["language_model"], "pruner_phase": {"steps": 1}}}
            ),
        ),
        "ways": (Way("loop"),),
        "budgets": (16,),
        "focus": 16,
        "num_images": 6,
    }
    return Study(**(values | others))


def place(cell, *names: str) -> tuple:
    return tuple(cell.labels[name] for name in names)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cells").iterdir()}


# ---------------------------------------------------------------------------------------------------- cells


@pytest.fixture(scope="module")
def shipped() -> Study:
    return Study.from_file(SHIPPED)


def test_the_shipped_study_has_all_it_promises(shipped):
    cells = cells_of(shipped)
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


def test_the_grid_comes_first_then_seed_by_seed_the_matrices_and_the_ablations(shipped):
    order = [(cell.labels["table"], cell.labels["seed"]) for cell in cells_of(shipped)]
    ranks = [
        {"base": 0, "grid": 1 + s, "budgets": 4 + 2 * s, "pruners": 4 + 2 * s, "ablations": 5 + 2 * s}[t]
        for t, s in order
    ]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) == 10


def test_a_run_needs_nothing_that_comes_later(shipped):
    """Matrices reuse the runs of the grid: none trains anything that the grid has not trained."""
    grid = {run.name for cell in cells_of(shipped) if cell.labels["table"] == "grid" for run in cell.runs}
    other = {
        run.name for cell in cells_of(shipped) if cell.labels["table"] in ("budgets", "pruners") for run in cell.runs
    }
    assert other <= grid


def test_arms_differ_by_what_they_say_alone(shipped):
    runs = {run.name: run for cell in cells_of(shipped) for run in cell.runs}
    plain, taught = runs["in-the-loop-pool-16-seed1"], runs["in-the-loop-KL-pool-16-seed1"]
    dense = runs["dense-seed1"]
    assert plain.recipe == dense.recipe == shipped.recipe
    assert merged(plain.recipe, shipped.ways[1].recipe) == taught.recipe != plain.recipe
    assert dense.plan is None
    assert plain.plan.to_dict() == taught.plan.to_dict()


def test_a_learned_pruner_is_tested_with_its_own_weights_and_stands_in_untrained(shipped):
    cells = {
        place(c, "way", "table", "pruner", "tested", "budget", "tested_budget", "seed"): c for c in cells_of(shipped)
    }
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
def test_every_recipe_of_the_shipped_study_is_one(table, shipped, tmp_path):
    runs = [run for cell in cells_of(shipped) if cell.labels["table"] == table for run in cell.runs]
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


# ---------------------------------------------------------------------------------------------------- claims


def test_a_claim_excludes_all_others_and_is_let_go(tmp_path):
    with claim(tmp_path / "locks" / "a") as mine, claim(tmp_path / "locks" / "a") as other:
        assert mine
        assert not other
    with claim(tmp_path / "locks" / "a") as again:
        assert again


def test_a_process_that_is_killed_lets_go(tmp_path):
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(600)"
    )
    path = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with claim(path) as mine:
            assert not mine
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with claim(path) as mine:
            assert mine


# ---------------------------------------------------------------------------------------------------- work


DONE = small(
    ways=(Way("loop"), Way("taught", {"model": KL})),
    budgets=(16, 9),
    ablations=(Ablation("reserve", "gate", "loop", pruner={"reserve": 2}),),
)
"""The study that most tests look at."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """One process that has made a whole study of two steps a run."""
    bench = open_bench(DONE, tmp_path_factory.mktemp("study"), QUIET)
    assert bench.work(cells_of(DONE)) == len(cells_of(DONE))
    return bench


@pytest.fixture(scope="module")
def done(bench) -> tuple[Study, Path]:
    return DONE, bench.folder


def test_every_cell_is_made_and_every_run_kept(done):
    study, folder = done
    cells = cells_of(study)
    for cell in cells:
        record = json.loads((folder / "cells" / f"{cell.name}.json").read_text())
        scores = Scores.load(folder / "cells" / f"{cell.name}.npz")
        assert record["metric"] == scores.metric == "exact_match"
        assert scores.num_images == study.num_images
    for run in {run.name: run for cell in cells for run in cell.runs}.values():
        model = load_trained(folder / "train" / run.name).model
        assert (run.plan is None) or plan_of(model).to_dict() == run.plan.to_dict()
    assert not list(folder.rglob("*.part*"))


def test_a_second_run_makes_nothing_and_changes_nothing(done, monkeypatch):
    study, folder = done
    before = files(folder)
    monkeypatch.setattr(engine, "train", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(Bench, "test", lambda *a, **k: pytest.fail("tested again"))
    assert open_bench(study, folder, QUIET).work(cells_of(study)) == 0
    assert files(folder) == before


def test_a_run_is_what_fit_makes_of_its_recipe(done, tmp_path):
    """Pictures kept from run to run and encoded once change no weight."""
    study, folder = done
    run = next(r for c in cells_of(study) for r in c.runs if r.name == "taught-gate-9-seed0")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(run.recipe))
    args = ["fit", "--config", str(path), "--model.plan", json.dumps(run.plan.to_dict()), "--seed_everything", "0"]
    run_recipe([*args, "--trainer.default_root_dir", str(tmp_path)], progress=False)
    ours, plain = (load_trained(f).model.state_dict() for f in (folder / "train" / run.name, tmp_path))
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    base = load_base("tiny_llava").state_dict()
    assert any(not torch.equal(base[name], ours[name]) for name in base)  # it has learnt something


def test_a_cell_is_what_its_model_answers(bench):
    """Own budget and another one; weights of the gate from its run."""
    study, folder = DONE, bench.folder
    cells = {place(c, "table", "way", "pruner", "budget", "tested", "tested_budget"): c for c in cells_of(study)}
    model = load_trained(folder / "train" / "loop-gate-16-seed0").model
    expected = evaluate(model, bench.processor, bench.task.rows, pack=True)
    assert_same(folder, cells["grid", "loop", "gate", 16, "gate", 16], expected)
    with budgets(model, [Budget(keep_tokens=9)]):
        expected = evaluate(model, bench.processor, bench.task.rows, pack=True)
    assert_same(folder, cells["budgets", "loop", "gate", 16, "gate", 9], expected)
    free = cells["grid", FREE, "random", None, "random", 16]
    model = attach(load_base("tiny_llava"), free.plan).eval()
    assert_same(folder, free, evaluate(model, bench.processor, bench.task.rows, pack=True))


def assert_same(folder, cell, expected: Scores) -> None:
    found = Scores.load(folder / "cells" / f"{cell.name}.npz")
    np.testing.assert_array_equal(found.value_IF, expected.value_IF)
    loss, wanted = (s.sums["log_likelihood"][0] for s in (found, expected))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5, atol=1e-6)


def test_images_are_encoded_once_for_all_runs(bench):
    runs = {run.name for cell in cells_of(DONE) for run in cell.runs}
    assert len(runs) > 5
    assert len(bench.kept) == DONE.recipe["data"]["init_args"]["num_train"]


def test_an_interrupted_study_keeps_what_it_has_and_goes_on(tmp_path, monkeypatch):
    study = small(contenders=(Contender("pool", "pool"), Contender("uniform", "uniform")))
    cells = [cell for cell in cells_of(study) if cell.labels["table"] == "grid"]
    calls, real = [], engine.train

    def interrupted(training, *others):
        calls.append(training.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(training, *others)

    monkeypatch.setattr(engine, "train", interrupted)
    with pytest.raises(KeyboardInterrupt, match="kept in .*the same command goes on"):
        open_bench(study, tmp_path, QUIET).work(cells)
    kept = files(tmp_path)
    assert 0 < len(kept) // 2 < len(cells)
    made = open_bench(study, tmp_path, QUIET).work(cells)
    assert made == len(cells) - len(kept) // 2
    assert {name: content for name, content in files(tmp_path).items() if name in kept} == kept
    assert calls[0] not in calls[2:]  # the finished run is not done again, the interrupted one is
    assert calls[1] in calls[2:]


def test_what_another_process_holds_is_left_until_it_lets_go(tmp_path, monkeypatch):
    study = small(contenders=(Contender("pool", "pool"), Contender("uniform", "uniform")))
    cells = [cell for cell in cells_of(study) if cell.labels["table"] in ("base", "grid")]
    held = [tmp_path / "locks" / "cell-base-dense.lock", tmp_path / "locks" / "train-loop-pool-16-seed0.lock"]
    waits = []
    with claim(held[0]) as first:
        second = claim(held[1])
        assert first
        assert second.__enter__()

        def look(seconds: float) -> None:
            """The others let go only after everything else is done."""
            waits.append({path.stem for path in (tmp_path / "cells").glob("*.json")})
            second.__exit__(None, None, None)
            assert len(waits) == 1

        monkeypatch.setattr(engine.time, "sleep", look)
        without = [cell for cell in cells if cell.name != "base-dense"]
        assert open_bench(study, tmp_path, QUIET).work(without) == len(without)
        assert "base-dense" not in {path.stem for path in (tmp_path / "cells").glob("*.json")}
    trained = next(cell for cell in without if cell.run and cell.run.name == "loop-pool-16-seed0")
    assert waits == [{cell.name for cell in without} - {trained.name}]
    assert open_bench(study, tmp_path, QUIET).work(cells) == 1


def test_a_run_that_meets_a_nan_stops_no_other(tmp_path, monkeypatch):
    study = small(contenders=(Contender("pool", "pool"), Contender("uniform", "uniform")))
    cells, real = [cell for cell in cells_of(study) if cell.labels["table"] == "grid"], engine.train

    def diverging(training, *others):
        if training.name == "loop-pool-16-seed0":
            raise engine.NonFiniteLoss("loss is nan at step 1.")
        real(training, *others)

    monkeypatch.setattr(engine, "train", diverging)
    with pytest.raises(ValueError, match=r"^1 cells could not be made, grid-loop-pool.*nan at step 1.*All others"):
        open_bench(study, tmp_path, QUIET).work(cells)
    assert len(list((tmp_path / "cells").glob("*.json"))) == len(cells) - 1


def test_a_folder_of_another_study_or_recipe_is_refused(done):
    study, folder = done
    with pytest.raises(ValueError, match=r"another setting \(data, task\)"):
        open_bench(replace(study, num_images=7), folder, QUIET).work(cells_of(study))
    changed = replace(study, recipe=merged(study.recipe, {"trainer": {"max_steps": 3}}))
    with pytest.raises(ValueError, match=r"another setting \(recipe\); remove that folder"):
        open_bench(changed, folder, QUIET).work(cells_of(changed))


@pytest.mark.slow
def test_two_processes_share_a_study_and_make_every_cell_once(tmp_path):
    study = {
        "recipe": small().recipe, "contenders": [{"name": n, "pruner": n} for n in ("pool", "uniform", "divprune")],
        "ways": [{"name": "loop"}], "budgets": [16], "focus": 16, "num_images": 6,
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "tpcompress.cli.main", "study", "--config", str(tmp_path / "study.yaml")]
    command += ["--out", str(tmp_path / "out")]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=600)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], texts
    cells = cells_of(Study.from_file(str(tmp_path / "study.yaml")))
    made = [line.split()[1].rstrip(":") for text in texts for line in text.splitlines() if "/" in line.split(" ")[0]]
    assert sorted(name for name in made if name in {c.name for c in cells}) == sorted(cell.name for cell in cells)


# ---------------------------------------------------------------------------------------------------- tables


def answers(right_IF, names=("a", "b"), **others) -> Scores:
    """Four questions of every family about every image."""
    right_IF = np.asarray(right_IF, dtype=float)
    count_IF = np.full(right_IF.shape, 4.0)
    return Scores(names, count_IF, {"accuracy": (right_IF, count_IF)}, **others)


def test_equal_images_leave_the_seeds_interval():
    """Scores 0.5, 0.25, 0.75: s = 0.25, so 4.303 * 0.25 / sqrt(3)."""
    runs = [answers(np.full((50, 2), n)) for n in (2, 1, 3)]
    found = score_of(runs)
    assert found.mean == pytest.approx(0.5)
    assert found.half == pytest.approx(4.303 * 0.25 / 3**0.5, rel=1e-6)
    assert found.seeds == 3


def test_equal_seeds_leave_the_images_interval():
    rng = np.random.default_rng(0)
    run = answers(rng.integers(0, 5, (400, 2)))
    found = score_of([run] * 3)
    assert found.mean == pytest.approx(run.score)
    assert found.half == pytest.approx(run.ci95, rel=0.01)
    assert score_of([run]).half == pytest.approx(run.ci95, rel=0.01)


def test_a_gain_is_paired_by_seed_and_image():
    rng = np.random.default_rng(0)
    others = [answers(rng.integers(0, 4, (80, 2))) for _ in range(3)]
    runs = [answers(other.value_IF + 1) for other in others]  # one of four questions more, whatever seed and image
    found = gain_of(runs, others)
    assert found.mean == pytest.approx(0.25)
    assert found.half == pytest.approx(0, abs=1e-9)
    assert found.clear
    shuffled = gain_of(runs, others[1:] + others[:1])
    assert shuffled.mean == pytest.approx(0.25)
    assert shuffled.half > 0.01  # the control: pairs that do not belong together
    with pytest.raises(ValueError, match="3 runs cannot be paired with 1"):
        gain_of(runs, others[:1])


def test_the_pool_of_seeds_has_their_mean():
    rng = np.random.default_rng(1)
    runs = [answers(rng.integers(0, 5, (30, 2)), learnt=("a",)) for _ in range(3)]
    assert pooled(runs).score == pytest.approx(np.mean([run.score for run in runs]))
    with pytest.raises(ValueError, match="different questions"):
        pooled([runs[0], answers(np.zeros((29, 2)))])


def test_intervals_cover_what_repetitions_would_show():
    """Seeds and images both vary; 95 % of the intervals hold the truth, those of images alone clearly fewer."""
    rng = np.random.default_rng(0)
    inside = alone = 0
    for _ in range(100):
        images_I1 = rng.normal(0, 0.2, (60, 1))
        runs = []
        for _ in range(3):
            chance_IF = np.clip(0.5 + images_I1 + rng.normal(0, 0.08), 0.02, 0.98)
            runs.append(answers(rng.binomial(4, np.broadcast_to(chance_IF, (60, 2)))))
        found = score_of(runs)
        inside += abs(found.mean - 0.5) <= found.half
        alone += abs(found.mean - 0.5) <= pooled(runs).ci95
    assert 90 <= inside <= 100
    assert alone < inside - 10


@pytest.mark.parametrize(("freedom", "t"), [(0.5, 12.706), (1, 12.706), (2, 4.303), (30, 2.042), (1e12, 1.96)])
def test_students_t_is_the_tabulated_one(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=1e-3)


def test_students_t_between_the_tabulated():
    assert t_quantile(60) == pytest.approx(2.000, abs=0.003)
    assert t_quantile(7) == pytest.approx(2.365, abs=0.01)
    falling = [t_quantile(f) for f in np.linspace(1, 60, 200)]
    assert falling == sorted(falling, reverse=True)


@pytest.fixture
def made_up(tmp_path) -> tuple[Study, Path]:
    """Cells with known answers: `a` is learnt, `b` is not; the loop gains one question in four over its control."""
    study = small(seeds=(0, 1, 2), contenders=(Contender("pool", "pool"), Contender("uniform", "uniform")))
    bench = open_bench(study, tmp_path, QUIET)
    bench.check(cells_of(study))
    for cell in cells_of(study):
        way, labels = cell.labels["way"], cell.labels
        right = {"base-dense": 4, "base-blind": 0}.get(cell.name, {CONTROL: 2, FREE: 1, "loop": 3}.get(way, 0))
        if labels["pruner"] == "uniform" and way == "loop" and labels["seed"]:
            continue  # not there yet
        right_IF = np.stack([np.full(20, right), np.ones(20)], 1)
        bench._write(cell, Made(scores=answers(right_IF)), {})
    write_tables(study, cells_of(study), bench)
    return study, tmp_path


def test_tables_hold_what_the_cells_hold(made_up):
    _, folder = made_up
    rows = {(r["table"], r["row"], r["column"]): r for r in json.loads((folder / "tables.json").read_text())}
    for column, mean in (
        (FREE, 0.25), (CONTROL, 0.5), ("loop", 0.75), ("loop − control", 0.25), ("loop − free", 0.5),
    ):  # fmt: skip
        found = rows["grid-16", "pool", column]
        assert found["mean"] == pytest.approx(mean)
        assert found["half"] == pytest.approx(0)
        assert found["seeds"] == 3
    assert rows["grid-16", "uniform", "loop"]["seeds"] == 1
    assert rows["pruners", "pool", "uniform"]["mean"] == pytest.approx(0.75)
    assert rows["budgets", "pool / 16", "tested at all"]["mean"] == pytest.approx(0.75)
    assert rows["reference", "base", "score"]["mean"] == pytest.approx(1.0)
    lines = (folder / "tables.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)


def test_tables_mark_what_was_not_learnt_what_is_missing_and_what_is_clear(made_up):
    _, folder = made_up
    text = (folder / "tables.md").read_text()
    assert "| score | a | b* |" in text
    (pool,) = [line for line in text.splitlines() if line.startswith("| pool | 25.0 ± 0.0 | 50.0")]
    assert "**+25.0 ± 0.0**" in pool
    (uniform,) = [line for line in text.splitlines() if line.startswith("| uniform | 25.0 ± 0.0 | 50.0")]
    assert "75.0 ± 0.0 (1)" in uniform
    assert "| pool | loop | 75.0 ± 0.0 | 75 | 25 |" in text


def test_tables_of_an_empty_folder_say_nothing(tmp_path):
    study = small()
    write_tables(study, cells_of(study), open_bench(study, tmp_path, QUIET))
    assert json.loads((tmp_path / "tables.json").read_text()) == []
    assert f"0 of {len(cells_of(study))} cells" in (tmp_path / "tables.md").read_text()


def test_a_document_gets_its_tables_between_the_markers(tmp_path):
    study, document = small(), tmp_path / "README.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    run_study(study, tmp_path, QUIET, tables=True, into=document)
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old\n" not in text
    assert "### Without pruning" in text
    with pytest.raises(ValueError, match="no place for the tables"):
        fill("nothing", "tables")


def test_the_shipped_readme_has_a_place_for_the_tables():
    text = (Path(__file__).resolve().parents[2] / "recipes" / "studies" / "README.md").read_text()
    assert fill(text, "X").count("X") >= 1
    assert DENSE in text
