"""Every recipe is read; the ones that ship with a base, and the 7B ones on a tiny stand-in, take two steps."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from support import family_folder
from training.distributed.ranks import on_ranks
from training.helpers import TOKENS, Watch, Workplace, callback, found, save_base, save_chat

from tpcompress.cli.main import main
from tpcompress.compress.recipe import PRESETS, family_of_base
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.recipe_files import read_recipe
from tpcompress.training.recipe.run import RecipeCLI, run_recipe

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "recipes").rglob("*.yaml"))


@cache
def kind(path: Path) -> str:
    """comparison, estimators, overlay, run or study, by what the file says."""
    if path.parent.name == "shared" or path.stem == "benchmarks":
        return "shared"
    values = yaml.safe_load(path.read_text())
    named = {"model": "run", "trainer": "overlay", "contenders": "study", "estimators": "estimators"}
    return next((name for key, name in named.items() if key in values), "comparison")


def of(name: str, folder: str = "") -> list:
    return [pytest.param(p, id=f"{p.parent.name}/{p.stem}") for p in FILES if kind(p) == name and folder in str(p)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return Workplace(
        save_base(tmp_path_factory.mktemp("base")),
        save_chat(tmp_path_factory.mktemp("chat")),
        tmp_path_factory.mktemp("runs"),
    )


@pytest.fixture
def stand_in(work, tmp_path) -> list[str]:
    """Arguments that put the tiny base and the photographs where a 7B recipe has its own."""
    return [
        *("--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
        *("--model.base", str(work.base), "--data.init_args.train", str(work.chat / "chat.json")),
        *("--data.init_args.image_folder", str(work.chat / "images"), "--data.init_args.num_workers", "0"),
    ]


def test_there_are_recipes_of_every_kind():
    assert len(of("run", "tiny_llava")) >= 4
    assert len(of("run", "llava15_7b")) >= 4
    assert len(of("run", "presets")) >= 13  # tests/training/recipe/test_presets.py says what is in them
    assert len(of("overlay")) >= 2
    assert len(of("comparison")) >= 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_header_says_what_and_how(path):
    lines = path.read_text().splitlines()
    header = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    assert header
    assert all(len(line) <= 125 for line in lines)
    command = next((line for line in header if line.startswith("tpcompress ")), "")
    if kind(path) != "shared":
        assert f"recipes/{path.relative_to(ROOT / 'recipes')}" in command
    for word in command.split():
        if word.startswith("recipes/"):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize("path", of("run"))
def test_a_recipe_is_what_its_classes_take(path, work, tmp_path):
    big = ["--model.base", str(work.base)] if path.parent.name != "tiny_llava" else []
    cpu = [
        "--trainer.accelerator",
        "cpu",
        "--trainer.precision",
        "32-true",
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    cli = RecipeCLI(["--config", str(path), *cpu, *big], progress=False, run=False)
    values = yaml.safe_load(path.read_text())
    assert (cli.model.plan is None) == ("plan" not in values["model"])
    own = f"runs/{path.parent.name}/{path.stem}"
    assert values["trainer"]["default_root_dir"] == own


@pytest.mark.parametrize("path", of("comparison"))
def test_a_comparison_is_read(path):
    comparison = Comparison.from_file(str(path))
    assert comparison.training_free or comparison.only_results
    for arm in comparison.training_aware:
        assert (ROOT / arm.recipe).is_file()


@pytest.mark.parametrize(
    "path",
    [
        p
        if any(name in str(p.values[0]) for name in ("any_budget", "gate_question"))  # README trains pool_full
        else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
        for p in of("run", "tiny_llava")
    ],
)
def test_the_bundled_recipes_take_two_steps(path, tmp_path):
    args = ["--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    args += ["--data.init_args.num_train", "4", "--data.init_args.num_val", "2", "--data.init_args.batch_size", "2"]
    args += ["--model.pruner_phase.steps", "1"] if "pruner_phase" in yaml.safe_load(path.read_text())["model"] else []
    run = run_recipe(["fit", "--config", str(path), *args], progress=False)
    assert run.trainer.global_step == 2
    assert torch.isfinite(run.trainer.callback_metrics["val/loss"])
    assert (tmp_path / "checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("precision", ["bf16-mixed", pytest.param("32-true", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "path",
    [
        p if "gate" in str(p.values[0]) else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
        for p in of("run", "llava15_7b")
        if "_free" not in str(p.values[0])
    ],
)
def test_the_7b_recipes_take_two_steps_on_a_tiny_stand_in(path, precision, stand_in):
    args = [*stand_in, "--trainer.max_steps", "2", "--trainer.max_epochs", "-1", "--trainer.precision", precision]
    args += ["--model.pruner_phase.steps", "1"] if "learned_gate" in path.read_text() else []
    args += ["--model.dtype", "float32"] if precision == "32-true" else []
    args += ["--trainer.callbacks+", yaml.safe_dump(callback(Watch), default_flow_style=True)]
    run = run_recipe(["fit", "--config", str(path), *args], progress=False)
    watch = found(run, Watch)
    assert run.trainer.global_step == 2
    assert run.model.model.peft_config["default"].r == 64
    assert watch.changed[-1]
    assert all("lora_" in name or "modules_to_save" in name for name in watch.changed[-1])
    assert any("projector" in name for name in watch.changed[-1])
    assert max(watch.widths) > TOKENS  # the curriculum starts with all tokens, the scorer sees all
    assert run.trainer.callback_metrics["vision_tokens"] == 64
    assert run.trainer.callback_metrics["loss/kl"] > 0
    assert torch.isfinite(run.trainer.callback_metrics["loss/total"])


QUICK = ("internvl3",)
FAMILIES = {name.split("/")[0]: (family, name) for family, name in PRESETS.items()}


@pytest.mark.parametrize("folder", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in FAMILIES])
def test_the_recipe_of_a_family_takes_two_steps_on_a_tiny_model_of_its_class(folder, stand_in):
    family, name = FAMILIES[folder]
    args = [*stand_in, "--trainer.max_steps", "2", "--trainer.max_epochs", "-1", "--trainer.precision", "32-true"]
    args += ["--model.base", str(family_folder(family)), "--model.dtype", "float32", "--data.init_args.batch_size", "2"]
    args += ["--trainer.accumulate_grad_batches", "1", "--trainer.logger", "false"]
    run = run_recipe(["fit", "--config", str(ROOT / "recipes" / name), *args], progress=False)
    values = read_recipe(ROOT / "recipes" / name)
    assert len((ROOT / "recipes" / name).read_text().splitlines()) <= 10
    assert family_of_base(str(family_folder(family))) == family
    assert run.trainer.global_step == 2
    assert run.model.model.peft_config["default"].r == values["model"]["lora"]["r"]
    assert torch.isfinite(run.trainer.callback_metrics["loss/total"])
    assert run.trainer.callback_metrics["loss/kl"] > 0


def test_the_free_recipe_validates(stand_in, capsys):
    path = ROOT / "recipes/llava15_7b/dart_free.yaml"
    assert main(["validate", "--config", str(path), *stand_in, "--data.init_args.val_fraction", "0.4"]) == 0
    assert "val/loss" in capsys.readouterr().out


def ddp(stand_in: list[str]) -> list[str]:
    """Three steps of two processes, through both phases, with parts that get no gradient in one of them."""
    recipe, overlay = (ROOT / "recipes" / name for name in ("llava15_7b/gate_lora.yaml", "gpus/ddp.yaml"))
    args = ["--config", str(recipe), "--config", str(overlay), *stand_in, "--trainer.devices", "2"]
    args += ["--trainer.max_steps", "3", "--trainer.accumulate_grad_batches", "1", "--model.pruner_phase.steps", "1"]
    return [*args, "--data.init_args.batch_size", "1", "--trainer.precision", "32-true", "--model.dtype", "float32"]


def assert_trained(folder: Path) -> None:
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["tpcompress"]["step"] == saved["tpcompress"]["steps"] == 3


def test_two_processes_train_with_the_ddp_overlay(stand_in, tmp_path):
    codes, said = on_ranks(ddp(stand_in), tmp_path / "said.txt", 240)
    assert codes == [0, 0], said
    assert_trained(tmp_path)
    assert "error" not in said


@pytest.mark.slow
def test_the_command_starts_the_other_process_of_the_ddp_overlay(stand_in, tmp_path):
    env = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tpcompress.cli.main", "fit", *ddp(stand_in)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert_trained(tmp_path)
    assert "error" not in done.stderr


def test_the_zero2_overlay_is_read_and_its_refusal_of_cpus_is_one_line(stand_in, capsys):
    recipe = ROOT / "recipes/llava15_7b/dart_lora.yaml"
    moved = "recipes/llava15_7b/zero2.yaml"  # where the overlays of all families were
    assert main(["fit", "--config", str(recipe), "--config", moved, *stand_in]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: The DeepSpeed strategy is only supported on CUDA GPUs")
    assert "Traceback" not in err


def test_the_zero2_overlay_makes_its_strategy():
    from lightning.pytorch.strategies import DeepSpeedStrategy

    values = yaml.safe_load((ROOT / "recipes/gpus/zero2.yaml").read_text())["trainer"]["strategy"]
    assert values["class_path"] == f"lightning.pytorch.strategies.{DeepSpeedStrategy.__name__}"
    strategy = DeepSpeedStrategy(**values["init_args"])
    assert strategy.config["zero_optimization"]["stage"] == 2
    assert strategy.exclude_frozen_parameters
