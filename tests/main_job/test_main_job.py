"""From a base and a data file to a verified export and a comparison, by command, for every family and kind of plan.

By default every plan runs once, each on another main family; all others are slow tests. One run covers
rows of one and of several images, without images, of several turns and with videos (`rows.save_rows`), in ragged
batches of three in `fit` and alone in `compare`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from main_job.rows import save_rows
from support import MAIN_FAMILIES, family_folder

import tpcompress as tp
from tpcompress.cli.main import main
from tpcompress.data import PromptCollator, load_chat
from tpcompress.export import verify
from tpcompress.families import list_families
from tpcompress.models import load_processor

PLANS: dict[str, dict[str, Any]] = {
    "pool": {"plan": {"pruner": "pool", "keep_ratio": 0.25}},
    "divprune": {"plan": {"pruner": "divprune", "keep_ratio": 0.25}},
    "dart": {"plan": {"pruner": "dart", "layer": 2, "keep_ratio": 0.25}},
    "gate": {"plan": {"pruner": "learned_gate", "keep_ratio": 0.25}, "pruner_phase": {"steps": 1}},
}
"""Plans by name, with what trains them."""

STEPS = 2


def cases() -> list[Any]:
    """Every family with every plan; by default the first main families, each with a plan of its own."""
    names = [*MAIN_FAMILIES, *(name for name in list_families() if name not in MAIN_FAMILIES)]
    found = []
    for number, name in enumerate(names):
        for at, plan in enumerate(PLANS):
            default = name in MAIN_FAMILIES[: len(PLANS)] and at == number
            found.append(pytest.param(name, plan, marks=() if default else pytest.mark.slow, id=f"{name}-{plan}"))
    return found


def recipe(folder: Path, name: str, plan: str, data: Path, batch_size: int) -> Path:
    values = {
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "logger": False, "default_root_dir": str(folder / "run")},
        "model": {"base": str(family_folder(name)), "optimizer": {"lr": 1e-3}, **PLANS[plan]},
        "data": {
            "class_path": "ChatData",
            "init_args": {"train": str(data), "batch_size": batch_size, "num_workers": 0},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"batch{batch_size}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.mark.parametrize(("name", "plan"), cases())
def test_from_data_to_a_verified_export_and_a_table(
    name: str, plan: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = list_families()[name]
    data = save_rows(tmp_path / "data", family)
    run, out = tmp_path / "run", tmp_path / "export"

    assert main(["fit", "--config", str(recipe(tmp_path, name, plan, data, 3))]) == 0, capsys.readouterr().err
    assert main(["export", "--ckpt", str(run), "--out", str(out)]) == 0, capsys.readouterr().err
    report = verify(out)
    assert report.ok, str(report)

    model, processor = tp.from_pretrained(str(out)), load_processor(str(out))
    rows, _ = load_chat(data)
    assert len(rows) == len(json.loads(data.read_text())), "no row is bad"
    batch = PromptCollator(processor)([rows[index] for index in range(3)])
    batch.pop("meta")
    with torch.no_grad():
        pruned = model(**batch).logits[:, -1]
        with tp.disabled(model):
            dense = model(**batch).logits[:, -1]
    assert pruned.isfinite().all()
    assert (pruned - dense).abs().max() > 1e-4, "the plan acts"

    compare = {
        "base": str(family_folder(name)), "task": {"type": "chat", "data": str(data)}, "budgets": [0.25],
        "batch_size": 3, "training_free": ["uniform"], "out": str(tmp_path / "compare"),
        "training_aware": [str(recipe(tmp_path, name, plan, data, 1))],
    }  # fmt: skip
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(compare))
    assert main(["compare", "--config", str(path)]) == 0, capsys.readouterr().err
    report_file = (tmp_path / "compare" / "report.md").read_text()
    assert "uniform" in report_file
