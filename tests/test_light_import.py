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
    ["compress", "tiny_llava", "gone.json"],
    ["compress", "./gone", "rows.json"],
    ["fit", "tiny_llava", "./gone"],
    ["fit", "--config", "recipes/tiny_llava/pool_full.yaml", "--model.base", "./gone"],
    ["fit", "--config", "recipes/shared/lora.yaml"],
    ["fit", "--config", "recipes/qwen2_5_vl/divprune_lora.yaml", "--data.init_args.train=gone.json"],
    ["evaluate", "tiny_llava", "gone.json"],
    ["rank", "tiny_llava", "gone.json", "--image-folder", "gone"],
    ["verify", "gone"],
)
"""Command lines that are answered from signatures, docstrings and the file system alone."""


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


KNOWN = (
    "from transformers import AutoConfig\n"
    "assert 'tpcompress.export' not in sys.modules\n"
    f"assert type(AutoConfig.from_pretrained({str(EXPORTED)!r})).__name__ == 'TPCompressLlavaConfig'\n"
)


@pytest.mark.slow
def test_an_export_is_known_to_transformers_imported_later() -> None:
    done = run(f"import tpcompress, sys\n{KNOWN}")
    assert done.returncode == 0, done.stderr


def test_import_loads_nothing_of_training_and_an_export_is_known_to_transformers_imported_first() -> None:
    own_loop = set(tpcompress.MODULES["training.own_loop"])  # its modules load transformers' trainer
    done = run(
        f"import transformers.models.auto.configuration_auto, tpcompress, sys\n{KNOWN}"
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


def test_without_any_extra_an_export_and_an_own_loop_run_and_commands_name_what_they_need(tmp_path: Path) -> None:
    fit, compare = (
        ["fit", "--config", "recipes/tiny_llava/pool_full.yaml"],
        ["compare", "recipes/tiny_llava/compare.yaml"],
    )
    done = run(
        f"{BLOCK}from tpcompress.cli.main import main\n"
        f"assert main({fit!r}) == main({compare!r}) == 2\n"
        "import tpcompress as tp\n"
        f"report = tp.verify({str(EXPORTED)!r})\n"
        "assert report.ok, str(report)\n"
        f"model, processor = tp.from_pretrained({str(EXPORTED)!r}), tp.load_processor({str(EXPORTED)!r})\n"
        "ids = [[1, *[model.config.image_token_id] * model.config.image_seq_length, 5, 6]]\n"
        "import torch\n"
        "pixels = torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2)\n"
        "new = model.generate(input_ids=torch.tensor(ids), pixel_values=pixels, max_new_tokens=3)\n"
        "assert new.shape[1] > len(ids[0])\n"
        f"print(tp.summary(model)); tp.export(model, processor, {str(tmp_path / 'again')!r})\n"
        f"assert tp.verify({str(tmp_path / 'again')!r}).ok\n"
        "del sys.modules['accelerate']  # transformers' trainer, which the callback of an own loop extends, needs it\n"
        "print(tp.schedule_step.__name__, tp.ScheduleCallback.__name__)"
    )
    assert done.returncode == 0, done.stderr
    assert "retained per image" in done.stdout
    assert done.stdout.endswith("schedule_step ScheduleCallback\n")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    for line in errors:
        assert line.endswith("is not installed; install it with: pip install 'tpcompress[train]'.")
