"""The command: help, one line for every mistake, and what a run prints."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from training.helpers import Poison, Workplace, callback, save_base, save_chat

from tpcompress.cli.main import main
from tpcompress.pruners.registry import KINDS, list_parts

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "compress", "fit", "validate", "export", "verify", "compare", "study", "estimators", "cache-teacher", "quickstart",
    "inspect", "find-layer", "pruners", "families",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base")), save_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def work(made, tmp_path):
    return Workplace(*made, tmp_path)


@pytest.fixture
def fails(capsys):
    """Run a command that must fail, and give its one line."""

    def run(*args) -> str:
        capsys.readouterr()
        assert main([str(arg) for arg in args]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in out + err
        return err.removeprefix("error: ").strip()

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "tpcompress" in text
    assert len(text) > 80


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_the_usage_names_every_command(args, capsys):
    assert main(args) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in COMMANDS)


def test_help_says_what_the_settings_of_a_run_mean(capsys):
    for option, words in {
        "optimizer": "linear warm-up",
        "pruner_phase": "trains on the pruned sequence",
    }.items():
        with pytest.raises(SystemExit):
            main(["fit", f"--model.{option}.help"])
        assert words in " ".join(capsys.readouterr().out.split())


def test_pruners_and_families_are_listed(capsys):
    assert main(["pruners"]) == 0
    assert main(["families"]) == 0
    table = capsys.readouterr().out
    assert "learned_gate" in table
    assert "llava" in table
    assert main(["pruners", "dart"]) == 0
    assert "2502.11494" in capsys.readouterr().out
    for kind in KINDS:
        for name in list_parts(kind):
            assert name in table
            assert main(["pruners", name]) == 0
            assert all(argument in capsys.readouterr().out for argument in list_parts(kind)[name].argument_names()[:1])


def test_names_that_are_nearly_right(fails):
    assert fails("fitt").endswith("Did you mean fit?")
    assert fails("pruners", "divprun").endswith("Did you mean divprune?")


def test_inspect_prints_stages_and_cache_and_draws(tmp_path, capsys, fails):
    image, out = tmp_path / "grey.png", tmp_path / "seen.png"
    Image.new("RGB", (60, 40), "grey").save(image)
    given = ["inspect", "tiny_llava", "--image", image, "--prompt", "what ?", "--out", out]
    assert main([*map(str, given), "--plan", "uniform:36@0,random:9@1"]) == 0
    text = capsys.readouterr().out
    assert "144 -> 36" in text
    assert "36 -> 9" in text
    assert "layer 0: 39 columns, layer 1: 12 columns" in text
    assert f"Retained tokens: {out}" in text
    assert Image.open(out).format == "PNG"
    assert fails(*given).startswith("tiny_llava has no plan of its own; give --plan")
    assert fails(*given, "--plan", "unifrm:9").endswith("Did you mean uniform?")
    assert fails("inspect", "tiny_llava").startswith("There is no image and no video; give --image")


# ------------------------------------------------------------------------------------------------ wrong recipes

WRONG = {
    "model key": ({"model": {"distil": {"weight": 1}}}, "No key model.distil; known: base, plan, "),
    "trainer key": ({"trainer": {"max_step": 3}}, "No key trainer.max_step; known: accelerator, "),
    "section": ({"modle": {"base": "x"}}, "No key modle; known: seed_everything, trainer, model, data, "),
    "nested key": ({"model": {"optimizer": {"lrr": 1}}}, "model.optimizer: Optimizer has no 'lrr'; known: lr, "),
    "value": ({"trainer": {"max_steps": "many"}}, "trainer.max_steps: Expected a int. Got value: many"),
    "nested value": ({"model": {"optimizer": {"lr": "fast"}}}, "model.optimizer.lr: Expected a float. Got value: fast"),
    "choice": ({"trainer": {"precision": "99"}}, "trainer.precision: Expected a "),
    "data class": ({"data": {"class_path": "ChatDat"}}, "data: no class 'ChatDat'; known: BenchmarkData, ChatData or"),
    "data key": ({"data": {"init_args": {"trian": 1}}}, "data: ChatData has no 'trian'; known: train, val, "),
    "data value": ({"data": {"init_args": {"batch_size": 0}}}, "batch_size must be at least 1, got 0."),
    "schedule class": ({"model": {"schedule": {"class_path": "Linaer"}}}, "model.schedule: no class 'Linaer'; known"),
    "schedule value": (
        {"model": {"schedule": {"class_path": "Linear", "init_args": {"start": 0.5}}}},
        "A ramp needs start >= 1",
    ),
    "loss class": ({"model": {"losses": ["Lable"]}}, "model.losses: no class 'Lable'; known"),
    "loss weight": (
        {"model": {"losses": [{"class_path": "Label", "init_args": {"weight": -1}}]}},
        "Loss 'label' has weight -1",
    ),
    "teacher class": ({"model": {"teacher": "Cpoy"}}, "model.teacher: no class 'Cpoy'; known"),
    "lora": ({"model": {"lora": {"rank": 8}}}, "lora: got an unexpected keyword argument 'rank'"),
    "train": ({"model": {"train": ["head"]}}, "train: unknown part head; choose of vision_tower, projector"),
    "pruner": ({"model": {"plan": {"pruner": "poool", "keep_tokens": 9}}}, "No pruner 'poool'. Known: cdpruner, dart"),
    "ratio": ({"model": {"plan": {"pruner": "pool", "keep_ratio": 1.5}}}, "keep_ratio must be in (0, 1], got 1.5"),
    "both budgets": (
        {"model": {"plan": {"pruner": "pool", "keep_ratio": 0.5, "keep_tokens": 9}}},
        "A stage needs exactly one of keep_ratio and keep_tokens, got both",
    ),
    "growing stages": (
        {
            "model": {
                "plan": {"stages": [{"pruner": "pool", "keep_tokens": n, "layer": n // 5} for n in (5, 10)]}
            }
        },
        "Stage 1 (layer 2) keeps 10 of the vision tokens after stage 0 kept 5; budgets must not grow.",
    ),
    "too deep": ({"model": {"plan": {"pruner": "pool", "keep_tokens": 9, "layer": 4}}}, "Stage 0 acts at layer 4, but"),
    "layer 0": ({"model": {"plan": {"pruner": "fastv", "keep_tokens": 9}}}, "Pruner 'fastv' needs attention of the"),
    "no scorer steps": (
        {"model": {"plan": {"pruner": "learned_gate", "keep_tokens": 9}, "pruner_phase": {"steps": 9}}},
        "The pruner phase has 9 of 3 steps",
    ),
    "every": ({"checkpoints": {"every": 0}}, "checkpoints.every must be at least 1 step, got 0."),
    "base folder": ({"model": {"base": "/gone/base"}}, "No folder /gone/base; give a folder, a hub id"),
    "accelerator": ({"trainer": {"accelerator": "cuda"}}, "`CUDAAccelerator` can not run"),
    "missing data": ({"data": {"init_args": {"train": "/gone.json"}}}, "No file or folder /gone.json."),
    "missing images": ({"data": {"init_args": {"image_folder": "/gone"}}}, "No image folder /gone;"),
}  # fmt: skip


def merged(values: dict, changes: dict) -> dict:
    """Nested mappings laid over each other; plans and classes are replaced."""
    for key, change in changes.items():
        mergeable = isinstance(change, dict) and isinstance(values.get(key), dict) and key != "plan"
        values[key] = merged(dict(values[key]), change) if mergeable else change
    return values


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_answered_in_one_line(name, work, fails):
    changes, message = WRONG[name]
    path = work.recipe()
    path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text()), changes)))
    line = fails("fit", "--config", path)
    assert line.startswith(message)
    assert not work.last().exists()


def test_wrong_options_on_the_shell(work, fails):
    path = work.recipe()
    assert fails("fit", "--config", path, "--model.bse", "x").endswith("Did you mean base?")
    assert fails("fit", "--config", path, "--nonsense", "x").startswith("No key nonsense; known: seed_everything")
    assert fails("fit", "somewhere").startswith("the following arguments are required: data; see tpcompress fit")
    assert fails("fit", path).endswith(f"tpcompress fit --config {path}.")
    assert fails("validate", "somewhere").startswith("No key somewhere;")
    assert fails("fit", "--config", "gone.yaml").startswith("No configuration file at gone.yaml; bundled recipes: ")
    assert fails("fit") == "A run needs data; give a recipe: --config recipes/tiny_llava/pool_full.yaml."
    assert fails("fit", "--config", path, "--ckpt_path", "gone.ckpt").startswith("No checkpoint at gone.ckpt;")
    assert fails("fit", "--config", path, "--ckpt_path", "last").startswith("No checkpoint at ")
    (work.folder / "bad.yaml").write_text("model: {a: [b\n")
    assert fails("fit", "--config", work.folder / "bad.yaml").startswith(f"{work.folder}/bad.yaml is not YAML: ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[]", "holds no rows;"),
        ("", "is empty;"),
        ("{not json", "is not valid JSON near"),
        ([{"conversations": [{"from": "human", "value": "hello ?"}]}], "No usable row in"),
        ([{"text": "hello"}], "has the columns text; chat data needs 'messages' or 'conversations'"),
        ([{"image": "gone.jpg"}], "Row data.json:0 is broken: missing image:"),
        ([{"image": "broken.jpg"}], "Row data.json:0 is broken: corrupt image:"),
    ],
)
def test_data_that_cannot_be_trained_on(work, fails, rows, message):
    images = work.folder / "images"
    images.mkdir()
    whole = (work.chat / "images/coffee.jpg").read_bytes()
    (images / "broken.jpg").write_bytes(whole[: len(whole) // 50])
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "a cup"}]
    if isinstance(rows, list):
        rows = json.dumps([row if "image" not in row else row | {"conversations": turns} for row in rows])
    (work.folder / "data.json").write_text(rows)
    data = {"train": str(work.folder / "data.json"), "image_folder": str(images)}
    strict = {"on_bad_row": "raise"} if "image" in str(rows) else {}
    assert message in fails("fit", "--config", work.recipe(data=data | strict))


def test_an_unknown_hub_model_without_a_network(work, fails, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = fails("fit", "--config", work.recipe(model={"base": "nobody/no-such-model"}))
    assert line.startswith("No model at 'nobody/no-such-model': ")
    assert line.endswith("give a folder, a hub id that can be reached, or tiny_llava.")


def test_traceback_shows_where(work):
    path = work.recipe(model={"train": ["head"]})
    with pytest.raises(ValueError, match="unknown part head"):
        main(["fit", "--config", str(path), "--traceback"])


def test_an_error_nobody_foresaw_says_so(work, fails, monkeypatch):
    def broken(*_):
        raise KeyError("inside")

    monkeypatch.setattr("tpcompress.training.recipe.export.export_run", broken)
    assert fails("export", "out", "--ckpt", "x") == "'inside' (KeyError; --traceback shows where)"


# ----------------------------------------------------------------------------------------------------- one life


@pytest.mark.slow
def test_a_run_from_fit_to_verify(work, capsys, fails):
    path, out = work.recipe(data={"val_fraction": 0.2}), work.folder / "out"
    assert main(["fit", "--config", str(path)]) == 0
    printed = capsys.readouterr()
    assert "step 3/3 · loss " in printed.err
    assert "· 16 vision tokens · " in printed.err
    assert "Next: tpcompress export --ckpt" in printed.out.replace("\n", " ")
    assert main(["validate", "--config", str(path), "--ckpt_path", str(work.last())]) == 0
    assert "val/loss" in capsys.readouterr().out
    assert main(["export", str(out), "--ckpt", str(work.folder / "run")]) == 0
    assert "out" in fails("export", out, "--ckpt", work.folder / "run")
    assert main(["export", str(out), "--ckpt", str(work.folder / "run"), "--overwrite", "true"]) == 0
    assert main(["verify", str(out)]) == 0
    free = work.folder / "free"
    assert main(["export", str(free), "--base", str(work.base), "--plan", str(path)]) == 0


def test_what_cannot_be_exported(work, fails):
    both = "export needs either --ckpt, or --base and --plan."
    assert fails("export", "out") == both
    assert fails("export", "out", "--ckpt", "x", "--base", "y", "--plan", "z") == both
    assert fails("export", "out", "--base", "y") == both
    assert fails("export").startswith("the following arguments are required: out")
    assert fails("export", "out", "--ckpt", work.folder / "gone").startswith("No checkpoint at ")
    assert fails("export", "out", "--base", work.base, "--plan", "gone.yaml").startswith("No plan at gone.yaml;")
    work.fit(checkpoints={"every": 1}, trainer={"max_steps": 2})
    saved = torch.load(work.last(), weights_only=True)
    saved["tpcompress"]["steps"] = 9
    torch.save(saved, work.last())
    assert fails("export", work.folder / "out", "--ckpt", work.folder / "run").startswith(
        "This run stopped at step 2 of 9"
    )
    assert fails("verify", work.folder / "gone").startswith("No folder ")


def test_a_loss_that_is_not_finite_is_one_line(work, capsys):
    path = work.recipe(trainer={"callbacks": [callback(Poison, step=1, what="weight")]}, checkpoints={"every": 1})
    assert main(["fit", "--config", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after the report of the first batch
    assert line.startswith("error: ")
    assert "The loss is not finite at step 1 (label nan); the last checkpoint is intact." in line
    assert work.saved()["tpcompress"]["step"] == 1


@pytest.mark.slow
def test_a_run_prints_little_and_stops_at_once_when_interrupted(work):
    path = work.recipe(trainer={"max_steps": 5000, "logger": True})
    command = [sys.executable, "-m", "tpcompress.cli.main", "fit", "--config", str(path)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    # A shell's background job ignores interrupts, and so would what it starts.
    options = {
        "text": True,
        "cwd": ROOT,
        "env": env,
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as run:
        lines = []
        for line in run.stderr:
            lines.append(line)
            if line.startswith("step 20/"):
                break
        for _ in range(2):
            run.send_signal(signal.SIGINT)
            try:
                out, err = run.communicate(timeout=60)
                break
            except subprocess.TimeoutExpired:  # Python drops an interrupt that falls into a destructor: press again
                continue
    assert run.returncode == 130
    assert out == ""
    # Python says so where it loses an interrupt; the run stops all the same.
    lines += re.sub(r"Exception ignored in.*?\nKeyboardInterrupt: ?\n", "", err, flags=re.S).splitlines(keepends=True)
    first = next(line for line in lines if line.startswith("step "))
    report, lines = lines[: lines.index(first)], lines[lines.index(first) :]
    assert report[0].startswith("First batch: ")
    assert len(report) < 8
    assert all(line.startswith(("step ", "error: ")) for line in lines), lines
    assert lines[-1].startswith("error: Interrupted; resume with the same command and --ckpt_path ")
    assert 20 <= work.saved()["tpcompress"]["step"] < 5000
