"""`tpcompress compress`: from a data file to a verified export and its comparison, in steps that are not repeated."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from compress.photos import save_photos
from support import family_folder

import tpcompress as tp
from tpcompress.cli.main import main
from tpcompress.compress import run
from tpcompress.compress.recipe import RunChoices, make_recipe
from tpcompress.compress.summary import sentence, serving_sentence
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.insertion.plan import PruningPlan


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("photos") / "data", 12)


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_from_a_data_file_to_a_verified_export(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def verify(folder: Path) -> tp.export.VerifyReport:
        calls["verify"] += 1
        return tp.verify(folder)

    monkeypatch.setattr(run, "verify_in_fresh_process", verify)
    out = tmp_path / "out"
    given = ["compress", "tiny_llava", str(data), "--keep", "1/4", "--out", str(out)]
    given += ["--rules", "pool", "--lora", "4", "--steps", "2", "--batch-size", "2"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert all(f"{number}/5 {name}" in printed for number, name in enumerate(run.STEPS, 1))
    assert "verified: the loaded export behaves as the trained model" in printed

    choice = json.loads((out / "choice.json").read_text())
    assert choice["rule"] == "pool"
    assert choice["not_servable"] is None
    assert serving_sentence(choice) in (out / "recipe.yaml").read_text().splitlines()[1]
    assert serving_sentence(choice) in printed
    model = tp.load(out / "export")
    assert tp.plan_of(model).to_dict() == choice["plan"] == PruningPlan.of(out / "recipe.yaml").to_dict()
    recipe, control = (yaml.safe_load((out / f"{name}.yaml").read_text()) for name in ("recipe", "control"))
    assert control["model"]["plan"] is None
    assert recipe["trainer"]["max_steps"] == control["trainer"]["max_steps"] == 2
    assert recipe["data"] == control["data"]
    comparison = Comparison.from_file(str(out / "compare.yaml"))
    assert comparison.budgets == (0.25,)
    report = json.loads((out / "compare/report.json").read_text())
    assert [row["arm"] for row in report["rows"]] == [
        "dense", "training_free", "dense_ft", "dense_ft", "training_aware",
    ]  # fmt: skip
    assert report["export"] == {"dir": str(out / "export"), "verified": True}

    parts = [lines(str(out / f"data/{part}.jsonl")) for part in ("train", "choose", "table")]
    images = [{row["images"][0] for row in part} for part in parts]
    assert [len(part) for part in images] == [6, 3, 3]
    assert len(set.union(*images)) == 12
    assert recipe["data"]["init_args"]["train"] == str(out / "data/train.jsonl")
    assert comparison.task["data"] == str(out / "data/table.jsonl")

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert main(given) == 0  # nothing is repeated
    again = capsys.readouterr().out
    assert "training " not in again
    assert calls["verify"] == 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == stamps
    assert again[again.index("5/5 compare") :] == printed[printed.index("5/5 compare") :]

    assert main([*given[:3], "--keep", "1/9", *given[5:]]) == 2
    assert "other arguments (keep: 1/4, now 1/9); choose another --out." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "gemma3"])
def test_all_rules_on_forty_photographs(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save_photos(tmp_path / "photos", 40)
    given = ["compress", str(family_folder(family)), str(data), "--keep", "1/4", "--out", str(tmp_path / "out")]
    assert main([*given, "--lora", "8", "--steps", "10", "--servable"]) == 0
    choice = json.loads((tmp_path / "out/choice.json").read_text())
    assert choice["ranked"] > 5
    assert choice["layer"] == 0
    assert json.loads((tmp_path / "out/verified.json").read_text())["ok"]
    assert "next:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--keep", "1/0"],
            "--keep 1/0: '1/0' is not a budget; write tokens (64), a fraction (1/9) or a ratio (0.11).",
        ),
        (["--keep", "many"], "--keep many: 'many' is not a budget"),
        (["--data", "./gone.json"], "No file or folder"),
        (["--model", "./gone"], "No folder ./gone; give a folder"),
        (["--lora", "-1"], "lora must be at least 0"),
        (["--rules", "pool,divprun"], "No pruner 'divprun'. Known: "),
        (["--metric", "nope"], "No metric 'nope'"),
    ],
)
def test_mistakes_are_one_line(
    changes: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"--model": "tiny_llava", "--data": str(data), "--out": str(tmp_path / "out"), changes[0]: changes[1]}
    assert main(["compress", *(word for pair in values.items() for word in pair)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()  # so that the corrected command is not refused


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("tome", "'tome' returns sizes or positions"),
        ("fastv", "'fastv' reads layers of the language model"),
        ("cdpruner", "'cdpruner' reads the prompt"),
        ("fastervlm", "'fastervlm' reads tower"),
    ],
)
def test_a_rule_that_no_engine_takes_is_refused_at_once(
    rule: str, reason: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compress", "tiny_llava", str(data), "--servable", "--rules", f"pool,{rule}"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    assert f"error: --servable with --rules {rule}: {reason}" in capsys.readouterr().err
    choices = RunChoices("tiny_llava", str(data), f"{rule}:9@{int(rule == 'fastv')}", "out", servable=True)
    with pytest.raises(ValueError, match="No serving engine can run this plan"):
        make_recipe(choices, 100)


def test_the_sentence_says_who_can_serve_the_plan() -> None:
    assert serving_sentence({"not_servable": "'x' reads the prompt", "engines": []}).startswith(
        "No serving engine can run it: 'x' reads the prompt; --servable"
    )
    assert serving_sentence({"not_servable": None, "engines": ["vLLM", "SGLang"]}) == "Servable with vLLM and SGLang."
    assert "no engine that this version knows" in serving_sentence({"not_servable": None, "engines": []})
    assert "tpcompress export prints" in serving_sentence({})


def test_a_folder_of_something_else_is_left_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["compress", "tiny_llava", str(data), "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no compression; choose another --out." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_sentence_counts_tokens_per_question() -> None:
    report = Report(meta={"metric": "accuracy", "learnt": ["a"]})
    report.add(
        Row("training_aware", "pool", keep_tokens=9, vision_tokens=192.5, retained_tokens=12.2, score=0.5, num_images=4)
    )
    text = sentence(report, {"rule": "pool", "layer": 0, "ranked": 3}, "9", verified=True)
    assert "with 12.2 of 192.5 vision tokens per question on 4 held-out rows" in text
