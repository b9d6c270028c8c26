"""Exported folders of tiny models for the loading matrix, made once a session, and the process without tpcompress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from export.remote_code.child import answers
from safetensors.torch import load_file, save_file
from support import batch, family_folder, stir, tiny_model

import tpcompress as tp
from tpcompress.families import list_families
from tpcompress.models import load_processor

CHILD = Path(__file__).with_name("child.py")
GATE = {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}
PLANS: dict[str, list[tuple[Any, int, float]]] = {
    "gate": [(GATE, 0, 0.4)],
    "merging": [("tome", 0, 0.4)],
    "gate, then divprune inside": [(GATE, 0, 0.5), ("divprune", 3, 0.2)],
    "fastv inside": [("fastv", 2, 0.3)],
    "merging inside": [("tome", 2, 0.3)],
}
"""(pruner, layer, ratio) of every stage."""
EVERYWHERE = ("gate", "merging")
"""Plans for every family: a stage before the language model."""
INSIDE = ("llava", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
"""Families that are also tested with stages inside the language model."""
CHEAP = (("llava", "gate, then divprune inside"), ("qwen2_5_vl", "merging"))
"""Pairs of the default run."""


def pairs() -> list[tuple[str, str]]:
    """Every family with the plans that it is tested with."""
    return [
        (family, plan)
        for family in list_families()
        for plan in (PLANS if family in INSIDE else EVERYWHERE)
    ]  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """An exported folder, an input for its model, and what `tp.load` answers."""

    folder: Path
    inputs: Path
    expected: dict[str, Any]


@cache
def exported(family: str, plan: str) -> Exported:
    """Export a tiny model of a family with one of `PLANS`."""
    return export_tiny(family, [tp.Stage(pruner, layer, keep_ratio=ratio) for pruner, layer, ratio in PLANS[plan]])


def export_tiny(family: str, stages: Sequence[tp.Stage]) -> Exported:
    """Export a tiny model of a family."""
    root = Path(tempfile.mkdtemp(prefix=f"exported_{family}_"))
    base = tiny_model(family, *list_families()[family].tiny.variants[0])
    stir(tp.attach(base, tp.PruningPlan(list(stages))))
    kinds = [kind for kind in list_families()[family].tiny.kinds if kind == "image"]
    inputs = batch([(5, kinds, 9), (4, 1, 7)], family=family, config=base.config)
    folder = tp.export(base, load_processor(str(family_folder(family))), root / "out", probe_inputs=inputs)
    save_file({name: value.contiguous() for name, value in inputs.items()}, root / "inputs.safetensors")
    expected = answers(tp.load(folder), inputs)
    return Exported(folder, root / "inputs.safetensors", expected)


def run_child(
    folders: Sequence[tuple[Path | str, Path]],
    where: Path,
    ways: Sequence[str] = ("Auto class",),
    again: bool = True,
    isolated: bool = False,
) -> tuple[list[dict[str, Any] | None], list[Path], dict[str, str]]:
    """Load folders in a process without tpcompress.

    Args:
        folders: (folder or hub id, file of its inputs).
        where: for what the process writes; `where/hub` is its cache of the hub.
        ways: how to load them, in turn.
        again: also save each model.
        isolated: start Python with `-I -S`, with nothing on the path but the packages beside transformers, without
            tpcompress.

    Returns:
        The answers (None where loading failed), the folders saved again, and the errors by folder.
    """
    jobs = [
        {
            "folder": str(folder),
            "way": ways[n % len(ways)],
            "inputs": str(inputs),
            "answers": str(where / f"answers_{n}.safetensors"),
            "again": str(where / f"again_{n}") if again else None,
        }
        for n, (folder, inputs) in enumerate(folders)
    ]
    (where / "jobs.json").write_text(json.dumps(jobs))
    env = {
        **os.environ,
        "HF_MODULES_CACHE": str(where / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(where / "hub"),
    }
    env.pop("PYTHONPATH", None)
    command = [sys.executable, str(CHILD), str(where / "jobs.json")]
    if isolated:
        (where / "packages").mkdir()
        for path in Path(transformers.__file__).parents[1].iterdir():
            if not path.name.startswith("tpcompress"):
                (where / "packages" / path.name).symlink_to(path)
        start = f"import sys, runpy; sys.path.append({str(where / 'packages')!r}); sys.argv = sys.argv[1:]; "
        start += "runpy.run_path(sys.argv[0], run_name='__main__')"
        command = [sys.executable, "-I", "-S", "-c", start, *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=where)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.strip().splitlines()[-1])
    found = [load_file(job["answers"]) if Path(str(job["answers"])).is_file() else None for job in jobs]
    return found, [Path(str(job["again"])) for job in jobs], errors
