"""`tpcompress fit MODEL DATA`: the recipe that it writes, and options that are handed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compress.photos import save_photos
from support import family_folder

from tpcompress.cli.fit_short import fit_model, split_options
from tpcompress.cli.main import main
from tpcompress.compress.recipe import MIN_STEPS, PRESETS, RunChoices, make_recipe, write_recipe
from tpcompress.training.datamodules import chat


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_photos(tmp_path_factory.mktemp("photos") / "data", 6))


def choices(**changes: Any) -> RunChoices:
    values = {"model": "tiny_llava", "data": "rows.json", "plan": "divprune:1/9", "out": "runs/x"} | changes
    return RunChoices(**values)


def test_a_run_from_model_and_data(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, reads = tmp_path / "run", list[str]()
    read = chat.load_chat
    monkeypatch.setattr(chat, "load_chat", lambda source, *a, **k: reads.append(source) or read(source, *a, **k))
    given = ["fit", "tiny_llava", data, "--plan", "pool:1/9", "--lora", "4", "--out", str(out)]
    given += ["--trainer.max_steps", "2", "--trainer.logger=false", "--batch-size", "2", "--trainer.accelerator", "cpu"]
    assert main(given) == 0
    assert reads == [data], "the data are read once"
    assert f"tpcompress export --ckpt {out}" in capsys.readouterr().out.replace("\n", " ")
    written = yaml.safe_load((out / "fit.yaml").read_text())
    assert written["model"]["plan"]["stages"][0]["keep_ratio"] == pytest.approx(1 / 9)
    assert written["trainer"]["max_steps"] == MIN_STEPS  # the option of the recipe stands above it in this run only
    saved = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    assert saved["tpcompress"]["steps"] == 2
    assert main([*given[:3], "--plan", "pool:1/4", *given[5:]]) == 2
    assert "is the recipe of a run with other arguments; choose another --out." in capsys.readouterr().err


def test_options_of_the_run_and_of_the_recipe_are_told_apart() -> None:
    given = [
        "m",
        "d",
        "--plan=pool:9",
        "--lora",
        "8",
        "--trainer.max-steps",
        "3",
        "--model.dtype=float32",
        "--out",
        "o",
    ]
    own, others = split_options(fit_model, given)
    assert own == ["m", "d", "--plan=pool:9", "--lora", "8", "--out", "o"]
    assert others == ["--trainer.max_steps", "3", "--model.dtype=float32"]


@pytest.mark.parametrize(
    ("changes", "model"),
    [
        ({}, {"teacher": "AdapterOff", "train": ["projector"]}),
        ({"lora": 0}, {"teacher": None, "train": "full", "losses": ["Label"], "lora": None}),
        ({"plan": None}, {"teacher": None, "plan": None, "schedule": None, "losses": ["Label"]}),
        ({"plan": "learned_gate:16"}, {"schedule": None, "pruner_phase": {"steps": 25, "losses": ["Label"]}}),
        ({"plan": "dart:16@1"}, {"schedule": {"class_path": "Linear", "init_args": {"start": 9.0}}}),
    ],
)
def test_what_trains_follows_from_the_choices(changes: dict[str, Any], model: dict[str, Any]) -> None:
    found = make_recipe(choices(**changes), 40, gpu=False)["model"]
    assert {key: found[key] for key in model} == model


@pytest.mark.parametrize(
    ("rows", "steps", "accumulate"), [(10, 100, 1), (900, 112, 1), (1600, 100, 2), (64000, 1000, 8)]
)
def test_steps_are_one_epoch_but_not_too_few(rows: int, steps: int, accumulate: int) -> None:
    trainer = make_recipe(choices(), rows, gpu=False)["trainer"]
    assert (trainer["max_steps"], trainer["accumulate_grad_batches"]) == (steps, accumulate)
    assert make_recipe(choices(steps=7), rows, gpu=True)["trainer"]["max_steps"] == 7
    assert make_recipe(choices(), rows, gpu=True)["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize("family", PRESETS)
def test_a_family_starts_from_its_recipe(family: str) -> None:
    folder = str(family_folder(family))
    found = make_recipe(choices(model=folder), 100, gpu=False)
    assert found["model"]["base"] == folder
    assert found["data"]["init_args"]["max_length"] >= 4096
    assert found["data"]["init_args"]["train"] == "rows.json"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tiny_llava"], "the following arguments are required: data; see tpcompress fit --help."),
        (["./gone", "DATA"], "No folder ./gone; give a folder"),
        (["tiny_llava", "DATA", "--plan", "divprun:9"], "No pruner 'divprun'. Known: "),
        (["tiny_llava", "DATA", "--plan", "divprune:1/0"], "'1/0' is not a budget; write tokens (64)"),
        (["tiny_llava", "DATA", "--steps", "0"], "steps must be at least 1, got 0."),
        (["tiny_llava", "./gone.json"], "No file or folder"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], message: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *(data if word == "DATA" else word for word in given), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_recipe_of_another_run_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "fit.yaml"
    write_recipe({"a": 1}, path, "tpcompress fit --config fit.yaml")
    write_recipe({"a": 1}, path, "tpcompress fit --config fit.yaml")
    with pytest.raises(ValueError, match="other arguments"):
        write_recipe({"a": 2}, path, "tpcompress fit --config fit.yaml")
    assert path.read_text() == "# tpcompress fit --config fit.yaml\na: 1\n"
