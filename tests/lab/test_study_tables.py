"""Intervals of a study and the tables that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lab.small_study import QUIET, small

from tpcompress.evaluation.engine.cell import Made
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.seeds import gain_of, pooled, score_of
from tpcompress.evaluation.scoring.stats import t_quantile
from tpcompress.lab.study.cells import CONTROL, DENSE, FREE, cells_of
from tpcompress.lab.study.config import Contender, Study
from tpcompress.lab.study.run import open_bench, run_study
from tpcompress.lab.study.tables import BEGIN, END, fill, write_tables

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
