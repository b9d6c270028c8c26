"""Whoever runs a pruned checkpoint pays for torch and transformers, not for training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = ("lightning", "deepspeed", "datasets", "peft", "torchmetrics", "jsonargparse", "matplotlib")


def test_import_loads_nothing_of_training() -> None:
    code = (
        "import sys, tpcompress\n"
        "assert all(hasattr(tpcompress, name) for name in tpcompress.__all__)\n"
        "tpcompress.list_pruners(); tpcompress.list_families()\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
