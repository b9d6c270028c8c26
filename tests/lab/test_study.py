"""A study as it runs: every cell once, in company and after interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lab.small_study import KL, QUIET, files, place, small

from tpcompress.evaluation.engine import bench as engine
from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.engine.locks import claim
from tpcompress.evaluation.scoring.evaluate import evaluate
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.insertion.attach import attach, budgets, plan_of
from tpcompress.insertion.plan import Budget
from tpcompress.lab.study.cells import FREE, cells_of, merged
from tpcompress.lab.study.config import Ablation, Contender, Study, Way
from tpcompress.lab.study.run import open_bench
from tpcompress.models import load_base
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.recipe.run import run_recipe

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
    """Images kept from run to run and encoded once change no weight."""
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


@pytest.mark.slow
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
