"""Names of cells and runs, files in one line, fingerprints, and a folder that several processes fill."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tpcompress.bundled import base_path
from tpcompress.evaluation.compare.cells import cells_of
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.evaluation.engine import bench as engine
from tpcompress.evaluation.engine import fingerprint
from tpcompress.evaluation.engine.cell import Made, Run, check_names
from tpcompress.evaluation.engine.fingerprint import base_digest, code_digest, files_of
from tpcompress.evaluation.engine.locks import claim
from tpcompress.evaluation.engine.progress import duration, report_line
from tpcompress.evaluation.scoring.metrics import find_metric
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.lab.estimators.cells import cells_of as estimator_cells
from tpcompress.lab.estimators.config import EstimatorTable
from tpcompress.lab.study.cells import cells_of as study_cells
from tpcompress.lab.study.config import Study

QUIET = Console(quiet=True)


def write(folder: Path, **values) -> str:
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "c.yaml")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "an unknown time"), (20, "less than a minute"), (89, "about 1 min"), (720, "about 12 min")],
)
def test_no_time_is_zero_minutes(seconds, text):
    assert duration(seconds) == text


def test_a_finished_cell_shows_a_short_ratio():
    line = report_line(
        "pool-l0-0.1111111111111111", Made({"summary": "done"}), find_metric("accuracy").unit, [], {}, ()
    )
    assert line == "0/0 pool-l0-1/9: done"


# ---------------------------------------------------------------------------------------------------- names


def test_two_rows_of_a_comparison_never_share_a_file(tmp_path):
    twice = [{"pruner": "random", "label": "a b"}, {"pruner": "uniform", "label": "a-B"}]
    with pytest.raises(ValueError, match="two training-free rows are named a-b at layer 0; give one a label"):
        Comparison.from_file(write(tmp_path, training_free=twice))
    apart = [{"pruner": "random", "label": "a b"}, {"pruner": "uniform", "label": "a-B", "layer": 1}]
    check_names(cells_of(Comparison.from_file(write(tmp_path, training_free=apart))))


def study(tmp_path: Path, **values) -> Study:
    known = {
        "recipe": {}, "contenders": [{"name": "a", "pruner": "pool"}], "ways": [{"name": "loop"}], "budgets": [16],
        "focus": 16,
    }  # fmt: skip
    return Study.from_file(write(tmp_path, **(known | values)))


@pytest.mark.parametrize(
    ("key", "names"), [("contenders", ("a b", "a-b")), ("ways", ("in the loop", "in-the loop")), ("ways", ("x", "X"))]
)
def test_two_names_of_a_study_never_share_a_file(tmp_path, key, names):
    entries = [{"name": name} | ({"pruner": "pool"} if key == "contenders" else {}) for name in names]
    with pytest.raises(ValueError, match=f"The study's {key} '{names[0]}' and '{names[1]}' would share files; rename"):
        study(tmp_path, **{key: entries})


def test_names_that_only_meet_when_joined_are_refused(tmp_path):
    pruners = [{"name": "b c", "pruner": "pool"}, {"name": "c", "pruner": "uniform"}]
    made = study(tmp_path, contenders=pruners, ways=[{"name": "a"}, {"name": "a b"}])
    with pytest.raises(ValueError, match="^Two (results|training runs) would share the (file|folder) '[^\n]*$"):
        check_names(study_cells(made))


def test_two_columns_of_estimators_never_share_a_file(tmp_path):
    path = write(tmp_path, estimators=["soft noise"], scorers={"a b": "mlp", "a-b": "local_global"})
    with pytest.raises(ValueError, match="Two results would share the file 'base-soft-noise-a-b-16-s0'"):
        estimator_cells(EstimatorTable.from_file(path))


# ---------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "0"}, "seed must be a whole number, got '0'"),
        ({"downsample": "no"}, "downsample must be true or false, got 'no'"),
        ({"budgets": 16}, "budgets must be a list, each entry a number, got 16"),
        ({"training_free": "random"}, "training_free is a list, got 'random'"),
        ({"training_free": [{"pruner": "random", "seeds": [0, 0]}]}, "seeds of random: the same value is listed twice"),
        ({"metric": "exact"}, "No metric 'exact'; known: accuracy"),
        ({"task": "chats"}, "No task 'chats'; known: benchmark, chat"),
        ({"task": {"type": "chat"}}, "missing 1 required .*'data'"),
        ({"task": {"type": "chat", "data": "x.json"}, "num_images": 3}, "num_images belongs to the benchmark"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_file(tmp_path, values, message):
    with pytest.raises(ValueError, match=f"^{tmp_path}/c.yaml: [^\n]*{message}[^\n]*$"):
        Comparison.from_file(write(tmp_path, **values))


def test_the_task_of_a_file_takes_the_keys_of_today_or_its_own(tmp_path):
    plain = Comparison.from_file(write(tmp_path, num_images=3, seed=1)).make_task()
    assert plain.config() == {"type": "benchmark", "num_images": 3, "seed": 1, "split": "test"}
    own = Comparison.from_file(write(tmp_path, task={"type": "benchmark", "num_images": 3, "seed": 1})).make_task()
    assert own.config() == plain.config()


# ---------------------------------------------------------------------------------------------------- fingerprints


def test_a_base_is_known_by_its_content(tmp_path):
    shutil.copytree(base_path("tiny_llava"), tmp_path / "base")
    same = base_digest(str(tmp_path / "base"))
    assert same == base_digest("tiny_llava")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert base_digest(str(tmp_path / "base")) != same


def test_large_weights_are_known_by_size_and_header(tmp_path, monkeypatch):
    shutil.copytree(base_path("tiny_llava"), tmp_path / "base")
    monkeypatch.setattr(fingerprint, "SMALL", 0)
    before = base_digest(str(tmp_path / "base"))
    (weights,) = (tmp_path / "base").glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content + b"\0")
    assert base_digest(str(tmp_path / "base")) != before
    weights.write_bytes(content)
    assert base_digest(str(tmp_path / "base")) == before


def test_the_code_of_a_pruner_is_that_of_its_parts_and_helpers(monkeypatch):
    seen: list[str] = []
    real = fingerprint._source_digest
    monkeypatch.setattr(fingerprint, "_source_digest", lambda path: (seen.append(Path(path).name), real(path))[1])
    gate = {"type": "learned_gate", "scorer": "mlp", "selector": "soft_topk", "applier": "noise"}
    digests = {code_digest(PruningPlan([Stage(pruner, keep_tokens=4)])) for pruner in ("divprune", gate)}
    assert len(digests) == 2
    assert {"divprune.py", "learned_gate.py", "mlp.py", "soft_topk.py", "noise.py", "base.py"} <= set(seen)
    assert "fastv.py" not in seen
    assert code_digest(None) not in digests


def test_files_in_a_recipe_are_known_by_content(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("[]")
    recipe = {"data": {"init_args": {"train": str(path), "image_folder": str(tmp_path), "batch_size": 2}}}
    before = Run("x", recipe, None, 0).key("base")
    assert set(before["files"]) == {str(path), str(tmp_path)} == set(files_of(recipe))
    path.write_text("[1]")
    assert Run("x", recipe, None, 0).key("base") != before
    elsewhere = recipe | {"trainer": {"default_root_dir": "runs/other"}}  # overridden, so it decides nothing
    assert Run("x", elsewhere, None, 0).key("base")["recipe"] == Run("x", recipe, None, 0).key("base")["recipe"]


# ---------------------------------------------------------------------------------------------------- processes


def test_a_row_that_another_process_holds_is_left_until_it_lets_go(tmp_path, monkeypatch):
    path = write(tmp_path, budgets=[16], num_images=4, training_free=["uniform", "random"])
    held = claim(tmp_path / "out" / "locks" / "cell-training-free-uniform-l0-16-seed0.lock")
    assert held.__enter__()
    waits = []

    def let_go(seconds: float) -> None:
        waits.append({file.stem for file in (tmp_path / "out" / "cells").glob("*.json")})
        held.__exit__(None, None, None)
        assert len(waits) == 1

    monkeypatch.setattr(engine.time, "sleep", let_go)
    report = run_comparison(path, tmp_path / "out", QUIET)
    assert {row.pruner for row in report.arm("training_free")} == {"uniform", "random"}
    ((there),) = waits
    assert "training-free-random-l0-16-seed0" in there
    assert "training-free-uniform-l0-16-seed0" not in there


def test_a_process_with_other_settings_on_the_same_folder_is_noticed(tmp_path, monkeypatch):
    path = write(tmp_path, budgets=[16], num_images=4, training_free=["uniform"])
    monkeypatch.setattr(engine.Bench, "record", lambda self, cell: None)  # another process replaces every result
    with pytest.raises(ValueError, match="Another process fills .* with other settings .*; stop it"):
        run_comparison(path, tmp_path / "out", QUIET)


@pytest.mark.slow
def test_two_processes_share_a_comparison_and_make_every_row_once(tmp_path):
    path = write(tmp_path, budgets=[16, 36], num_images=16, training_free=["uniform", "random", "pool", "divprune"])
    command = [sys.executable, "-m", "tpcompress.cli.main", "compare", "--config", path, "--out", str(tmp_path / "out")]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=600)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], texts
    made = [line.split()[1].rstrip(":") for text in texts for line in text.splitlines() if "/10 " in line[:6]]
    assert sorted(made) == sorted(cell.name for cell in cells_of(Comparison.from_file(path)))
