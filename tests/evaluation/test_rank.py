"""`tpcompress rank`: which rules run where, what the table says, what resumes, and one line for every mistake."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from rich.console import Console
from support import family_folder, tiny_model

from tpcompress.cli.main import main
from tpcompress.evaluation import rank
from tpcompress.evaluation.figures.contact_sheet import COLUMNS, contact_sheet
from tpcompress.evaluation.figures.retained import Retained
from tpcompress.evaluation.rank import run_rank
from tpcompress.evaluation.rank_cost import CostCell
from tpcompress.evaluation.rank_report import Ranking, RankRow
from tpcompress.evaluation.rank_rules import Refusal, budget_of, read_budgets, rules_for
from tpcompress.evaluation.scoring.stats import Gain
from tpcompress.families import resolve
from tpcompress.insertion.budget import Budget
from tpcompress.insertion.plan import PruningPlan
from tpcompress.models import load_base
from tpcompress.pruners import create, list_pruners

RULES = ("random", "divprune", "fastv", "vtw")
MAIN = ("gemma3", "internvl", "llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm")


def printed() -> Console:
    return Console(file=io.StringIO(), width=100, record=True)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranking, Path, str]:
    """Four images of the benchmark at two budgets on the bundled base."""
    out, console = tmp_path_factory.mktemp("rank"), printed()
    ranking = run_rank("tiny_llava", None, "16,1/4", out, console, rules=RULES, num_images=4)
    return ranking, out, console.export_text()


# ---------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_every_rule_is_ranked_or_refused_with_a_reason(family: str) -> None:
    parts = resolve(tiny_model(family))
    rules, refused = rules_for(parts)
    assert {rule.name for rule in rules} | {each.rule for each in refused} == set(list_pruners())
    for rule in rules:
        assert rule.layer in parts.stage_layers
        assert not create(rule.name).learned
    reasons = {each.rule: each.reason for each in refused}
    assert "has weights to train" in reasons["learned_gate"]
    assert "find-layer" in reasons["vtw"]
    assert all(reason and "\n" not in reason for reason in reasons.values())
    layers = {rule.name: rule.layer for rule in rules}
    assert (layers["divprune"], layers["fastv"]) == (0, 2)


def test_names_of_rules() -> None:
    parts = resolve(load_base("tiny_llava"))
    rules, refused = rules_for(parts, RULES)
    assert [(rule.name, rule.layer) for rule in rules] == [("random", 0), ("divprune", 0), ("fastv", 1)]
    assert [each.rule for each in refused] == ["vtw"]
    for names, message in (
        (("divprun",), r"No pruner 'divprun'.*Did you mean divprune\?"),
        (("pool", "pool"), "names one twice"),
        (("vtw",), "None of the rules runs on this model; vtw: retains no token"),
    ):
        with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
            rules_for(parts, names)


def test_budgets() -> None:
    assert read_budgets("32, 64") == {"32": Budget(keep_tokens=32), "64": Budget(keep_tokens=64)}
    assert read_budgets([0.25, "1/9", 7]) == {
        "0.25": Budget(keep_ratio=0.25), "1/9": Budget(keep_ratio=1 / 9), "7": Budget(keep_tokens=7)
    }  # fmt: skip
    assert budget_of(Budget(keep_ratio=1 / 9)) == ("1/9", Budget(keep_ratio=1 / 9))
    for value in ("x", "1/0", "1/x", "-3", "9/4", "1.5", "", "0", "8,8", "0.5,1/2"):
        with pytest.raises(ValueError, match=r"^budgets[^\n]*$"):
            read_budgets(value)


# ---------------------------------------------------------------------------------------------------------- table


def test_the_table_has_every_rule_best_first(ranked: tuple[Ranking, Path, str]) -> None:
    ranking, _, text = ranked
    assert "on 4 rows" in " ".join(text.split())
    assert "Only 1 of 9 questions" in replace(ranking, counted="Only 1 of 9 questions count in number.").note
    for label, kept in (("16", 16), ("1/4", 36)):
        rows = ranking.at(label)
        assert {row.rule for row in rows} == set(RULES) - {"vtw"}
        assert [row.score for row in rows] == sorted((row.score for row in rows), reverse=True)
        assert [row.retained_tokens for row in rows] == [kept] * 3
        assert ranking.best(label).plan.stages[0].budget.count(144) == kept
        for row in rows:
            assert row.gain.delta == pytest.approx(row.score - ranking.dense)
            assert row.cost is not None
            assert row.cost["time_low"] <= row.cost["time"] <= row.cost["time_high"]
            assert 0 < row.cost["flops"] < 1
            assert row.served == (row.rule in ("divprune", "random"))
    assert ranking.best(16).score > ranking.dense / 2
    assert ranking.best("16", served=True).served
    assert "vtw: retains no token" in text
    assert "interleaved rounds on cpu" in text
    assert "…" not in text, "no column is cut at 100 characters"


def test_files(ranked: tuple[Ranking, Path, str]) -> None:
    ranking, out, _ = ranked
    found = json.loads((out / "rank.json").read_text())
    assert [row["rule"] for row in found["rows"]] == [row.rule for row in ranking.rows]
    assert PruningPlan.from_dict(found["rows"][0]["plan"]).to_dict() == ranking.rows[0].plan.to_dict()
    lines = (out / "rank.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 1 + 2 * (1 + 3)
    assert "- vtw: retains no token, whatever the budget; tpcompress find-layer finds its layer." in lines
    with Image.open(out / "retained.png") as sheet:
        assert sheet.width > 4 * 168


def test_the_same_command_measures_nothing_again(
    ranked: tuple[Ranking, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, out, _ = ranked
    made: list[str] = []
    plain, cost = rank.RankCell.make, CostCell.make
    monkeypatch.setattr(rank.RankCell, "make", lambda cell, bench: made.append(cell.name) or plain(cell, bench))
    monkeypatch.setattr(CostCell, "make", lambda cell, bench: made.append(cell.name) or cost(cell, bench))
    again = run_rank("tiny_llava", None, "16,1/4", out, printed(), rules=RULES, num_images=4)
    assert made == []
    assert again.to_dict() == before.to_dict()
    fewer = run_rank("tiny_llava", None, "16", out, printed(), rules=["divprune"], num_images=4)
    assert made == ["cost"], "times are ratios of one run"
    assert fewer.best(16).score == next(row.score for row in before.at(16) if row.rule == "divprune")
    with pytest.raises(ValueError, match=r"holds results of another setting \(data, task\)"):
        run_rank("tiny_llava", None, "16", out, printed(), rules=["divprune"], num_images=3)


def row_of(rule: str, score: float, flops: float | None = 0.5, served: bool = False) -> RankRow:
    plan = PruningPlan.of("divprune:4@0")
    return RankRow(rule, 0, "4", plan, score, 0.1, Gain(0.0, 0.0, 0.0), 16, 4, {"time": 1.0, "flops": flops}, served)


def ranking_of(rows: Sequence[RankRow], refused: Sequence[Refusal] = ()) -> Ranking:
    about: list[Any] = ["base", "rows", "accuracy", 0.9, 0.1, 0.5, 3, None, "cpu", Path()]
    return Ranking(rows, refused, ["4", "8"], *about)


def test_of_equal_scores_the_cheaper_rule_is_better() -> None:
    rows = [row_of("a", 0.5), row_of("b", 0.5, 0.2), row_of("c", 0.4, served=True), row_of("d", float("nan"))]
    ranking = ranking_of(rows, [Refusal("e", "refuses.", "4"), Refusal("e", "refuses.", "8")])
    assert [row.rule for row in ranking.rows] == ["b", "a", "c", "d"]
    assert ranking.best(4).rule == "b"
    assert ranking.best(4, served=True).rule == "c"
    assert ranking.refusals == ["e at 4, 8: refuses."]
    assert "say little about pruning" in ranking.note
    for budget, message in ((8, "No rule ran at budget 8; e at 4: refuses"), (5, "No budget 5 in this ranking")):
        with pytest.raises(ValueError, match=message):
            ranking.best(budget)


def test_a_rule_that_hardly_prunes_is_not_the_best() -> None:
    late, early = (replace(row_of(*about), layer_average=each) for *about, each in (("a", 0.9, 14.0), ("b", 0.5, 4.0)))
    assert ranking_of([late, early]).best(4).rule == "b"
    assert ranking_of([late, replace(early, layer_average=7.0)]).best(4).rule == "a"
    assert ranking_of([late]).best(4).rule == "a"


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": "144"}, r"prunes nothing: it retains all of the 144 vision tokens"),
        ({"model": "/gone"}, "rank requires data for /gone"),
        ({"model": "/gone", "data": {"type": "benchmark", "num_images": 1}}, "No folder /gone"),
        ({"data": "gone.json"}, "No file or folder gone.json"),
        ({"metric": "glory"}, "No metric 'glory'"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": "tiny_llava", "data": None, "budgets": "16"} | change
    with pytest.raises((ValueError, FileNotFoundError), match=f"^[^\n]*{message}[^\n]*$"):
        run_rank(**given, out=tmp_path / "out", console=printed(), rules=["uniform"], num_images=2)
    assert not (tmp_path / "out").exists()


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["rank", "tiny_llava", "--budgets", "x", "--out", str(tmp_path)]) == 2
    assert "budgets: 'x' is not a budget" in capsys.readouterr().err


def test_a_rule_that_refuses_the_rows_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Any, tokens: Any, num_keep_B: Any) -> Any:
        raise ValueError("two views are missing.\nmore")

    monkeypatch.setattr(list_pruners()["pool"], "forward", refuse)
    console = printed()
    ranking = run_rank("tiny_llava", None, "16", tmp_path, console, rules=["uniform", "pool"], num_images=2)
    assert [row.rule for row in ranking.rows] == ["uniform"]
    assert ranking.refusals == ["pool at 16: two views are missing."]
    assert "pool-l0-16: does not run: two views are missing" in console.export_text()


# --------------------------------------------------------------------------------------------------- contact sheet


def test_the_sheet_has_bands_of_equal_width(tmp_path: Path) -> None:
    image, keep = np.ones((20, 30, 3)), np.zeros((2, 3), bool)
    keep[0, 0] = True
    plain = Retained(image, keep, question="what is on the very long table over there by the window ?")
    tiled = Retained(image, keep, overview=Retained(np.ones((10, 10, 3)), np.ones((2, 2), bool)))
    merged = Retained(image, keep, np.arange(6).reshape(2, 3) // 3)
    assert (plain.kept, plain.total, tiled.kept, tiled.total) == (1, 6, 5, 10)
    rules = {f"rule {i}\n50 %": [(plain, tiled, merged)[i % 3]] * 2 for i in range(COLUMNS + 1)}
    contact_sheet({"a": rules}, tmp_path / "two.png")
    contact_sheet({"a": dict(list(rules.items())[:2])}, tmp_path / "one.png")
    with Image.open(tmp_path / "two.png") as two, Image.open(tmp_path / "one.png") as one:
        assert two.height == 2 * one.height
        assert two.width == (COLUMNS + 1) * 176 + 8
        drawn = np.asarray(one)[:, 176 + 8 : 176 + 8 + 168]  # the first rule, all white where it retains
        assert 0.1 < (drawn == 204).all(-1).mean() < 0.9
    for wrong in ({}, {"a": {}}, {"a": {"x": [], "y": []}}, {"a": {"x": [plain], "y": [plain] * 2}}):
        with pytest.raises(ValueError, match="Every rule needs the same images"):
            contact_sheet(wrong, tmp_path / "none.png")


# -------------------------------------------------------------------------------------------------------- families


def photos(folder: Path) -> Path:
    """A LLaVA file of three drawings of unequal shape."""
    rows = []
    for number, (width, height) in enumerate(((160, 90), (90, 160), (120, 120))):
        image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
        ImageDraw.Draw(image).ellipse((20, 20, 60, 60), fill="red")
        image.save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour ?"}, {"from": "gpt", "value": "red"}]
        rows.append({"image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.mark.slow
@pytest.mark.parametrize("family", MAIN)
def test_families_with_their_own_processor(family: str, tmp_path: Path) -> None:
    rules = ["divprune", "fastv", "pool", "visionzip", "random"]
    ranking = run_rank(str(family_folder(family)), str(photos(tmp_path)), "3", tmp_path / "out", printed(), rules=rules)
    listed = {row.rule for row in ranking.rows} | {each.rule for each in ranking.refused}
    assert listed == set(rules)
    assert {row.rule for row in ranking.rows} >= {"divprune", "fastv", "random"}
    assert all(row.retained_tokens < row.vision_tokens for row in ranking.rows)
    with Image.open(tmp_path / "out" / "retained.png") as sheet:
        assert sheet.width > 168 * 4


def test_tokens_of_a_prompt_are_summed_over_its_images() -> None:
    stage = SimpleNamespace(owner=[0, 0, 2], total=[16, 4, 9], vision_out=[3, 3, 5])
    assert rank._per_prompt(SimpleNamespace(stages=[None, stage])) == [(20, 6), (9, 5)]
    assert rank._per_prompt(SimpleNamespace(stages=[])) == []
