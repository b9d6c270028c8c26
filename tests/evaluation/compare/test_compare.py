"""Comparison and quickstart on the bundled base, with runs of a few steps and few of its rules."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from tpcompress.bundled import recipes_folder
from tpcompress.cli import quickstart as quickstart_module
from tpcompress.cli.quickstart import CONFIG, run_quickstart
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.evaluation.compare.run import run_comparison
from tpcompress.export import verify

ROW_KEYS = {"arm", "pruner", "keep_tokens", "vision_tokens", "seed", "score", "ci95", "families", "learnt"}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    """The quickstart with fewer images, budgets and steps."""
    folder = tmp_path_factory.mktemp("recipes")
    values = yaml.safe_load((recipes_folder() / "tiny_llava/quickstart.yaml").read_text())
    for path in [values["control"], *values["training_aware"]]:
        recipe = yaml.safe_load((recipes_folder().parent / path).read_text())
        recipe["trainer"]["max_steps"] = 4
        recipe["data"]["init_args"].update(batch_size=2, num_val=0)
        (folder / Path(path).name).write_text(yaml.safe_dump(recipe))
    values |= {"num_images": 8, "budgets": [16]}
    names = ("random", "novelty", "merged", "pool")
    values["training_free"] = [arm for arm in values["training_free"] if any(name in str(arm) for name in names)]
    values["control"] = str(folder / Path(values["control"]).name)
    values["training_aware"] = [str(folder / Path(p).name) for p in values["training_aware"] if "divprune" not in p]
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "quickstart.yaml")


@pytest.fixture(scope="module")
def done(config, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    console = Console(record=True, width=160)
    with pytest.MonkeyPatch.context() as patch:  # the README's commands verify in a fresh process
        patch.setattr(quickstart_module, "verify_in_fresh_process", verify)
        assert run_quickstart(folder, console, config) == 0
    return folder, console.export_text()


def test_the_quickstart_leaves_its_report_figures_and_a_verified_export(done):
    folder, text = done
    report = json.loads((folder / "report.json").read_text())
    assert all(set(row) >= ROW_KEYS for row in report["rows"])
    arms = [(row["arm"], row["pruner"]) for row in report["rows"]]
    assert len(arms) == len(set(arms))
    free = {p for a, p in arms if a == "training_free"}
    assert free == {"random", "novelty", "merged", "pool"}
    assert {p for a, p in arms if a == "training_aware"} == {"pool", "learned_gate"}
    assert {
        ("dense", None),
        ("dense_ft", None),
        ("dense_ft", "pool"),
        ("dense_ft", "novelty"),
    } <= set(arms)
    (gate,) = [row for row in report["rows"] if row["pruner"] == "learned_gate"]
    (control,) = [row for row in report["rows"] if (row["arm"], row["pruner"]) == ("dense_ft", "novelty")]
    assert gate["control_score"] == control["score"]
    assert gate["control_gain"][0] == pytest.approx(gate["score"] - control["score"])
    assert all(row["vision_tokens"] == 144 for row in report["rows"])
    assert {row["retained_tokens"] for row in report["rows"]} == {144, 16}
    assert report["export"] == {"dir": str(folder / "export"), "verified": True}
    assert all((folder / name).stat().st_size for name in ("report.md", "report.csv", "accuracy.png", "retained.png"))
    assert "verified True" in text
    assert "answered:" in text


@pytest.mark.slow
def test_a_second_run_reuses_every_row_and_run(done, config, monkeypatch):
    folder, _ = done
    before = json.loads((folder / "report.json").read_text())
    monkeypatch.setattr("tpcompress.evaluation.engine.bench.train", lambda *a: pytest.fail("trained again"))
    run_comparison(config, folder, Console(quiet=True))
    assert json.loads((folder / "report.json").read_text())["rows"] == before["rows"]


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_with_the_missing_rows(done, config, monkeypatch):
    folder, _ = done
    report = json.loads((folder / "report.json").read_text())
    lost = [row for row in report["rows"] if row["arm"] == "training_aware" and row["pruner"] == "pool"]
    (folder / "cells" / "training-aware-pool-l0-16-seed0.json").unlink()
    monkeypatch.setattr("tpcompress.evaluation.engine.bench.train", lambda *a: pytest.fail("trained again"))
    again = run_comparison(config, folder, Console(quiet=True))
    row = again.find("training_aware", "pool", 16)
    assert row is not None
    assert row.score == pytest.approx(lost[0]["score"])
    assert list(row.gain) == pytest.approx(lost[0]["gain"])


def test_a_failed_verification_is_the_exit_code(done, config, monkeypatch):
    folder, _ = done

    class Bad:
        ok = False

    monkeypatch.setattr(quickstart_module, "verify_in_fresh_process", lambda out: Bad())
    assert run_quickstart(folder, Console(quiet=True), config) == 1
    assert json.loads((folder / "report.json").read_text())["export"]["verified"] is False


def test_the_bundled_comparisons_parse():
    comparison = Comparison.from_file(CONFIG)
    assert list(comparison.budgets) == [16, 36]
    assert len(comparison.training_free) == 8
    assert len(Comparison.from_file("recipes/tiny_llava/compare.yaml").training_aware) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bugdets": [16]}, "known keys"),
        ({"budgets": []}, "budgets is empty"),
        ({"training_free": [{"pruner": "pool", "lier": 2}]}, "lier"),
        ({"training_aware": ["recipes/tiny_llava/dense_full.yaml"]}, "no model.plan"),
        ({"training_aware": ["recipes/tiny_llava/nothing.yaml"]}, "No configuration file"),
        ({"training_free": ["divprun"]}, "Did you mean divprune"),
        (
            {"training_aware": [f"recipes/tiny_llava/gate_{name}.yaml" for name in ("lm", "question")]},
            "gate_lm.yaml and [^ ]*gate_question.yaml both train learned_gate",
        ),
    ],
)
def test_a_wrong_comparison_is_one_line(tmp_path, change, message):
    values = {"base": "tiny_llava", "budgets": [16], "num_images": 2, **change}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises((ValueError, FileNotFoundError), match=f"^[^\n]*{message}[^\n]*$"):
        run_comparison(str(tmp_path / "c.yaml"), tmp_path / "out", Console(quiet=True))


@pytest.mark.slow
def test_a_folder_of_another_comparison_is_refused(done, tmp_path):
    folder, _ = done
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"num_images": 3}))
    with pytest.raises(ValueError, match=r"another setting \(data, task\); choose another --out"):
        run_comparison(str(tmp_path / "c.yaml"), folder, Console(quiet=True))
