"""The core: importing the package, and running an export, needs torch and transformers but no extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tpcompress
from tpcompress.errors import EXTRAS

ROOT = Path(__file__).parents[1]
EXPORTED = ROOT / "tests" / "export" / "exported_by_0.1.0"
HEAVY = sorted({*EXTRAS, "jsonargparse"} - {"accelerate"})  # transformers itself imports accelerate where it is found
BLOCK = f"import sys\nfor name in {sorted(EXTRAS)!r}: sys.modules[name] = None\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_import_loads_nothing_of_training() -> None:
    done = run(
        "import sys, tpcompress\n"
        "assert all(hasattr(tpcompress, name) for name in set(tpcompress.__all__) - set(tpcompress.LAZY))\n"
        "tpcompress.list_pruners(); tpcompress.list_families()\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_lazy_names_are_public() -> None:
    assert set(tpcompress.LAZY) <= set(tpcompress.__all__)
    assert all(callable(getattr(tpcompress, name)) for name in tpcompress.LAZY)


def test_an_export_runs_without_any_extra(tmp_path: Path) -> None:
    done = run(
        f"{BLOCK}import tpcompress as tp\n"
        f"report = tp.verify({str(EXPORTED)!r})\n"
        "assert report.ok, str(report)\n"
        f"model, processor = tp.from_pretrained({str(EXPORTED)!r}), tp.load_processor({str(EXPORTED)!r})\n"
        f"print(tp.summary(model)); tp.export(model, processor, {str(tmp_path / 'again')!r})\n"
        "from tpcompress.cli.main import main\n"
        f"assert main(['verify', {str(tmp_path / 'again')!r}]) == 0"
    )
    assert done.returncode == 0, done.stderr
    assert "retained per image" in done.stdout


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
