import csv
import io
import json
import re

import pytest
from rich.console import Console

from tpcompress.evaluation.compare.findings import findings
from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.compare.table import verdict
from tpcompress.evaluation.compare.write import print_report, report_markdown, write_report
from tpcompress.evaluation.scoring.metrics import PERCENT
from tpcompress.evaluation.scoring.stats import Gain

FAMILIES = ("attr", "count", "ocr")
LEARNT = ["attr", "count"]


def row(arm, pruner=None, keep=None, score=0.9, **more) -> Row:
    fields = {"retained_tokens": keep or 144, "ci95": 0.02, "learnt": LEARNT, "layer_average": keep or 144.0}
    families = {name: score for name in FAMILIES}
    return Row(arm, pruner, keep, score=score, families=families, **(fields | more))


@pytest.fixture
def report() -> Report:
    rows = [
        row("dense", score=0.95),
        row("dense_ft", score=0.955),
        row("dense_ft", "pool", 16, 0.36),
        row("dense_ft", "dart", 16, 0.58),
        row("training_free", "dart", 16, 0.61),
        row("training_free", "divprune", 16, 0.70),
        row("training_free", "pool", 16, 0.35),
        row("training_free", "random", 16, 0.40),
        row("training_free", "uniform", 16, 0.42),
        row("training_free", "fastv", 16, 0.5, layer=1, layer_average=80.0),
        row("training_aware", "pool", 16, 0.80),
        row("training_aware", "dart", 16, 0.62),
        row("training_aware", "divprune", 16, 0.60),
        row("training_aware", "learned_gate", 16, 0.38),
    ]
    meta = {"base": "tiny_llava", "num_images": 64, "blind": {"attr": 0.1, "count": 0.3, "ocr": 0.0}}
    return Report(rows, {"dir": "runs/export", "verified": True}, meta)


def text_of(report: Report, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_report(report, console)
    return console.file.getvalue()


def test_json_has_the_promised_keys_and_comes_back(report):
    values = json.loads(report.to_json())
    assert set(values) == {"rows", "export", "meta"}
    assert values["export"] == {"dir": "runs/export", "verified": True}
    promised = {"arm", "pruner", "keep_tokens", "retained_tokens", "seed", "score", "ci95", "families", "learnt"}
    assert promised <= set(values["rows"][0])
    assert Report.from_json(report.to_json()) == report


def test_unknown_numbers_become_null(report):
    nan = float("nan")
    report.add(row("training_free", "x", 4, nan, gain=(nan, nan, nan)))
    report.meta["blind"]["ocr"] = nan
    assert "NaN" not in report.to_json()
    assert Report.from_json(report.to_json()).rows[-1].score is None
    text_of(Report.from_json(report.to_json()))


def test_rows_are_found_and_replaced_by_their_key(report):
    number = len(report.rows)
    assert report.find("training_free", "fastv", 16, 1).score == 0.5
    assert report.find("training_free", "fastv", 16, 0) is None
    report.add(row("training_free", "fastv", 16, 0.55, layer=1))
    assert len(report.rows) == number
    assert report.find("training_free", "fastv", 16, 1).score == 0.55
    report.add(row("training_free", "fastv", 16, 0.55, layer=1, seed=1))
    assert len(report.rows) == number + 1


def test_wrong_input_is_one_line():
    with pytest.raises(ValueError, match="A row has no arm 'free'; choose one of dense, downsample, oracle, dense_ft"):
        Row("free")
    with pytest.raises(ValueError, match="This is not a report"):
        Report.from_json("[")
    with pytest.raises(ValueError, match="unknown row keys bananas"):
        Report.from_json('{"rows": [{"arm": "dense", "bananas": 3}]}')


def test_gains_say_whether_they_are_outside_the_interval():
    assert verdict(Gain(0.061, 0.01, 0.1), PERCENT) == "+6.1"
    assert verdict(Gain(0.004, -0.01, 0.02), PERCENT) == "n.s."
    assert verdict(Gain(-0.031, -0.05, -0.01), PERCENT) == "worse -3.1"


def test_paired_gains_go_before_independent_ones(report):
    aware = report.find("training_aware", "dart", 16)
    assert verdict(report.gain(aware), PERCENT) == "n.s."
    assert verdict(report.control_gain(aware), PERCENT) == "+4.0"
    paired = row("training_aware", "dart", 16, 0.62, gain=(0.01, 0.002, 0.02), control_gain=(0.0, -0.01, 0.01))
    assert verdict(report.gain(paired), PERCENT) == "+1.0"
    assert verdict(report.control_gain(paired), PERCENT) == "n.s."
    alone = row("training_aware", "x", 16, 0.62, control_score=0.5)
    assert report.gain(alone) is None
    assert verdict(report.control_gain(alone), PERCENT) == "+12.0"


def test_table_shows_families_tokens_and_verdicts(report):
    text = text_of(report)
    assert re.search(r"ocr\*", text)
    assert re.search(r"attr +count", text)
    assert "16 / 16 / 80" in text
    assert re.search(r"· pool +16 / 16 / 16 +80.0 ±2.0 +\+45.0 +\+44.0", text)
    assert re.search(r"· divprune +16 / 16 / 16 +60.0 ±2.0 +worse -10.0 +–", text)
    assert re.search(r"blind +20.0", text)


@pytest.mark.parametrize("width", [80, 100, 200])
def test_table_is_whole_at_any_width(report, width):
    text = text_of(report, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_findings_follow_from_the_rows(report):
    text = "\n".join(findings(report))
    assert "The dense base scores 95.0 % (mean of 2 learnt families); with blank images 20.0 %." in text
    assert "not in any score: ocr." in text
    assert "On this base, at 16 tokens per question, divprune is the best pruner without training: 70.0 %" in text
    assert "70.0 % (-25.0 against dense); not better than" in text
    assert "uniform (42.0 %): pool (35.0 %)" in text
    assert "so the gain comes from the pruner in the loop (+44.0)" in text
    assert "(+45.0, 75 % of the loss from pruning recovered)" in text
    assert (
        "divprune at 16 tokens, trained in the loop, reaches 60.0 % against 70.0 % without training (-10.0, worse)"
        in text
    )
    assert "ALARM: learned_gate trained at 16 tokens is below untrained uniform (42.0 %)." in text
    assert "beats the best untrained one (divprune, 70.0 %) by 10.0; pool is number 6 of 6 without training" in text
    assert "agrees with the trained model" in text


def test_findings_turn_with_the_rows(report):
    report.add(row("training_aware", "pool", 16, 0.37))
    report.add(row("dense_ft", "dart", 16, 0.70))
    report.export = {"dir": "runs/export", "verified": False}
    text = "\n".join(findings(report))
    assert "which is not clearly different" in text
    assert "the pruner in the loop did harm (-8.0, worse)" in text
    assert "the gain comes from" not in text
    assert "(dart, 62.0 %) is 8.0 below the best untrained one" in text
    assert "NOT verified" in text


def test_extra_steps_are_named_when_they_explain_the_gain(report):
    report.add(row("dense_ft", "pool", 16, 0.79))
    assert "so the gain comes from the extra steps, not from the pruner in the loop" in "\n".join(findings(report))


def test_several_seeds_are_counted(report):
    report.add(row("training_aware", "pool", 16, 0.36, seed=1))
    text = "\n".join(findings(report))
    assert "reaches 58.0 % against 35.0 %" in text
    assert "(+23.0 on average, above the 95 % interval in 1 of 2 seeds)" in text
    assert "pool (seed 1)" in text_of(report)


def test_empty_and_partial_reports_can_be_shown():
    for rows in ([], [row("dense")], [row("training_aware", "pool", 4)], [row("training_free", "pool", 4)]):
        text_of(Report(rows))
        report_markdown(Report(rows))


def test_files_are_written_whole(report, tmp_path):
    write_report(report, tmp_path / "new")
    write_report(report, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.json", "report.csv", "report.md"}
    assert Report.from_json((tmp_path / "new" / "report.json").read_text()) == report
    lines = list(csv.DictReader((tmp_path / "new" / "report.csv").open()))
    assert len(lines) == len(report.rows)
    assert lines[0]["family:attr"] == "0.95"
    markdown = (tmp_path / "new" / "report.md").read_text()
    assert "| · pool | 16 / 16 / 16 | 80.0 ±2.0 | +45.0 | +44.0 | 80.0 | 80.0 | 80.0 |" in markdown
    assert "- base: tiny_llava" in markdown


def test_a_base_that_has_learnt_nothing_has_a_marked_table():
    nothing = Row("dense", score=0.1, ci95=0.02, families={"a": 0.1}, learnt=[], retained_tokens=144)
    pruned = Row("training_free", "pool", 16, score=0.1, families={"a": 0.1}, learnt=[], retained_tokens=16)
    report = Report([nothing, pruned], meta={"blind": {"a": 0.1}})
    first, second = findings(report)[:2]
    assert first == "The dense base scores 10.0 % (family a); with blank images 10.0 %."
    assert second.startswith("In no family is the dense base clearly better than with blank images")
    text = report_markdown(report)
    assert "| dense | 144 | 10.0 ±2.0 |" in text
    assert "| a* |" in text
    assert "| · pool | 16 / 16 / – | 10.0 |" in text
    assert "*: not learnt by the dense base" in text
