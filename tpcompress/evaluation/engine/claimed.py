"""What a results folder holds: `bench.json` names base, data and metric, and results of others are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcompress.files import write_atomic

OLD = ("report.json", "study.json", "settings.json", "cells", "scores")
"""Files of a results folder of earlier versions, which wrote no `bench.json`."""


def claim_folder(folder: Path, settings: Mapping[str, Any] | None) -> None:
    """Write the settings of a folder, or check that it has these.

    Args:
        folder: the results folder.
        settings: what all its results share; None takes what is there.

    Raises:
        ValueError: the folder holds results of other settings, or of an earlier version.
    """
    path = folder / "bench.json"
    if not path.is_file() and any((folder / name).exists() for name in OLD):
        raise ValueError(f"{folder} holds results of an earlier version of tpcompress; choose another --out.")
    then = json.loads(path.read_text()) if path.is_file() else {}
    now = then if settings is None else json.loads(json.dumps(settings))
    if then and then != now:
        changed = ", ".join(name for name in now if now[name] != then.get(name))
        raise ValueError(
            f"{folder} holds results of another setting ({changed}); choose another --out or remove the folder."
        )
    write_atomic(path, json.dumps(now, indent=1))
