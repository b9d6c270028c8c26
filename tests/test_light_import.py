"""The core: importing the package, and running an export, needs torch and transformers but no extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tpcompress
from tpcompress.errors import EXTRAS

ROOT = Path(__file__).parents[1]
EXPORTED = ROOT / "tests" / "export" / "exported_by_0.1.0"
HEAVY = sorted({*EXTRAS, "jsonargparse"} - {"accelerate", "torchvision"})  # transformers itself imports these two
BLOCK = f"import sys\nfor name in {sorted(EXTRAS)!r}: sys.modules[name] = None\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


FRAMEWORKS = {*EXTRAS, "jsonargparse", "torch", "transformers", "huggingface_hub", "numpy"}
QUICK = (
    [],
    ["--help"],
    ["--version"],
    ["export", "--help"],
    ["find-layer", "-h"],
    ["fit", "--help"],
    ["validate", "--help"],
    ["fitt"],
    ["export", "--ovrwrite"],
)
"""Command lines that are answered from signatures and docstrings alone."""


def test_help_loads_no_framework() -> None:
    done = run(
        "import contextlib, io, sys\n"
        "from tpcompress.cli.main import main\n"
        f"for args in {QUICK!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "        main(args)\n"
        f"print(*sorted({FRAMEWORKS!r} & {{name.partition('.')[0] for name in sys.modules}}))"
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize(
    "first",
    [pytest.param("tpcompress", marks=pytest.mark.slow), "transformers.models.auto.configuration_auto"],
)
def test_an_export_is_known_to_transformers_in_any_order_of_imports(first: str) -> None:
    done = run(
        f"import {first}, tpcompress, sys\n"
        "from transformers import AutoConfig\n"
        "assert 'tpcompress.export' not in sys.modules\n"
        f"print(type(AutoConfig.from_pretrained({str(EXPORTED)!r})).__name__)"
    )
    assert done.stdout.split() == ["TPCompressLlavaConfig"], done.stderr


def test_import_loads_nothing_of_training() -> None:
    own_loop = set(tpcompress.MODULES["training.own_loop"])  # its modules load transformers' trainer
    done = run(
        "import sys, tpcompress\n"
        f"assert all(hasattr(tpcompress, name) for name in set(tpcompress.__all__) - {own_loop!r})\n"
        "tpcompress.list_pruners(); tpcompress.list_families()\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_every_public_name_is_there() -> None:
    assert {*tpcompress.WHERE, "export", "from_pretrained"} == set(tpcompress.__all__)
    assert all(callable(getattr(tpcompress, name)) for name in tpcompress.__all__)
    assert set(tpcompress.__all__) <= set(dir(tpcompress))
    with pytest.raises(AttributeError, match="no attribute 'attatch'"):
        _ = tpcompress.attatch


def test_an_export_runs_without_any_extra(tmp_path: Path) -> None:
    done = run(
        f"{BLOCK}import tpcompress as tp\n"
        f"report = tp.verify({str(EXPORTED)!r})\n"
        "assert report.ok, str(report)\n"
        f"model, processor = tp.from_pretrained({str(EXPORTED)!r}), tp.load_processor({str(EXPORTED)!r})\n"
        "ids = [[1, *[model.config.image_token_id] * model.config.image_seq_length, 5, 6]]\n"
        "import torch\n"
        "pixels = torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2)\n"
        "new = model.generate(input_ids=torch.tensor(ids), pixel_values=pixels, max_new_tokens=3)\n"
        "assert new.shape[1] > len(ids[0])\n"
        f"print(tp.summary(model)); tp.export(model, processor, {str(tmp_path / 'again')!r})\n"
        "from tpcompress.cli.main import main\n"
        f"assert main(['verify', {str(tmp_path / 'again')!r}]) == 0"
    )
    assert done.returncode == 0, done.stderr
    assert "retained per image" in done.stdout


@pytest.mark.slow
def test_an_own_loop_needs_no_training_framework() -> None:
    block = BLOCK.replace("'accelerate', ", "")
    done = run(f"{block}import tpcompress as tp\nprint(tp.schedule_step.__name__, tp.ScheduleCallback.__name__)")
    assert done.stdout.split() == ["schedule_step", "ScheduleCallback"], done.stderr


def test_a_command_names_the_extra_that_it_needs() -> None:
    code = f"{BLOCK}from tpcompress.cli.main import main\nsys.exit(main(sys.argv[1:] or "
    for arguments in (
        ["fit", "--config", "recipes/tiny_llava/pool_full.yaml"],
        ["compare", "recipes/tiny_llava/compare.yaml"],
    ):
        done = run(f"{code}{arguments!r}))")
        assert done.returncode == 2, done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert line.endswith("is not installed; install it with: pip install 'tpcompress[train]'.")
