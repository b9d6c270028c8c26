"""The card says what a reader must know, and says nothing of what is not known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import tpcompress as tp
from tpcompress.export.budgets import CurvePoint
from tpcompress.export.card import card
from tpcompress.export.license import license_of

LOOK = {"step": 40, "behind_random": -0.3, "behind_random_error": 0.05, "accuracy": 0.61, "random_accuracy": 0.42}
POINT = CurvePoint("9 tokens", 9.0, 0.5, 0.02, 0.6, 1.25, 640, 320, "some questions", 0, False)


@pytest.fixture
def manifest(exported: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((exported / "manifest.json").read_text())
    return found


def test_an_export_has_a_card(exported: Path, manifest: dict[str, Any]) -> None:
    text = (exported / "README.md").read_text()
    assert text == card(manifest, exported.name)
    assert "README.md" in manifest["files"]
    assert "| 0 | 0 | learned_gate | 32 tokens | 32 of 64 |" in text
    assert "| 1 | 3 | divprune | 8 tokens | 8 of 64 |" in text
    for absent in ("## Training", "## Accuracy by budget", "beat random", "base_model", "keep_tokens="):
        assert absent not in text


def test_what_trained_and_how(manifest: dict[str, Any]) -> None:
    losses = [{"class": "Label"}, {"class": "KL", "weight": {"class": "Ramp", "start": 0.0}}]
    facts = {"steps": 800, "train": ["projector"], "losses": losses, "teacher": None, "base": "org/model"}
    manifest["base"]["model"] = "org/model"
    text = card(manifest | {"trained_with": facts}, "out")
    assert "| losses | Label(), KL(weight=Ramp(start=0.0)) |" in text
    assert "| train | projector |" in text
    assert "| teacher | none |" in text
    assert text.startswith("---\n")
    assert "\nbase_model: org/model\n---\n" in text


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (-0.3, "beats random selection of as many tokens: its label loss is 0.300 nats lower (standard error 0.050)"),
        (0.3, "falls behind random selection of as many tokens: its label loss is 0.300 nats higher"),
        (-0.09, "cannot be distinguished from random selection"),
        (None, "could not be measured"),
    ],
)
def test_whether_the_pruner_beat_random(gap: float | None, words: str, manifest: dict[str, Any]) -> None:
    found = {"last": LOOK | {"behind_random": gap}, "alarms": []}
    text = card(manifest | {"trained_with": {"diagnostics": found}}, "out")
    assert words in text
    assert "No alarms." in text
    alarmed = card(manifest | {"trained_with": {"diagnostics": found | {"alarms": ["it drifts."]}}}, "out")
    assert "- ALARM: it drifts." in alarmed
    assert "No alarms." not in alarmed


def test_accuracy_by_budget(manifest: dict[str, Any]) -> None:
    span = {"low": {"keep_tokens": 16}, "high": {"keep_tokens": 64}, "retained": [16, 64]}
    points = [POINT.to_dict(), POINT.to_dict() | {"budget": "32 tokens", "trained": True}]
    text = card(manifest | {"budget_curve": points, "trained_budgets": [span, span]}, "out")
    assert "| 9 tokens * | 9.0 | 50.0 % ± 2.0 | 60.0 % | 1.250 | 640 | 0 |" in text
    assert "| 32 tokens | 9.0 |" in text
    assert "* outside of the trained range." in text
    assert 'tp.load("out", keep_tokens=[16, 16])' in text
    assert "| 32 of 64 | 16 to 64 |" in text


def test_the_license_of_the_base_is_kept(base: Any, processor: Any, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    card = "---\nlicense: other\nlicense_name: own-terms\nlicense_link: LICENSE.txt\n---\n# Base\n"
    (tmp_path / "base" / "README.md").write_text(card)
    base.config.name_or_path = str(tmp_path / "base")
    out = tp.export(tp.attach(base, "divprune:8@0"), processor, tmp_path / "out")
    head = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "own-terms", "LICENSE.txt")
    assert head["pipeline_tag"] == "image-text-to-text"
    assert license_of(None) == license_of(str(tmp_path / "gone")) == license_of("no one/else") == {}
