"""`verify`: checks the files of an exported folder and replays its probe, here or in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from tpcompress.errors import first_line
from tpcompress.export.contents import damaged_files, read_json, read_manifest, unnamed_files, unusable_files
from tpcompress.export.loader import load, load_processor
from tpcompress.export.manifest import differing_facts
from tpcompress.export.probe import Probe
from tpcompress.export.remote_code.folder import check_code
from tpcompress.export.replay import VerifyReport, check
from tpcompress.families import family_of
from tpcompress.families.packages import missing_packages
from tpcompress.insertion.attach import plan_of

PACKAGE = Path(__file__).resolve().parent.parent.parent
"""Folder that tpcompress is imported from."""


def verify(folder: str | Path, *, allow_outside: bool = False, device: str | None = None) -> VerifyReport:
    """Check every file of an export and replay its probe, in the dtype and attention implementation of training.

    The manifest must name every file, agree with the model, and list the code that this version generates.

    Args:
        folder: local folder.
        allow_outside: import pruners that are not part of tpcompress.
        device: device of the replay; default: the kind of device that the probe was recorded on, if available.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, or its manifest is damaged.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    damaged = damaged_files(folder, manifest, hashes=True)
    broken = unusable_files(damaged, folder)

    def failed(error: str) -> VerifyReport:
        return VerifyReport(str(folder), len(manifest["files"]), damaged, error)

    if broken:
        name, what = next(iter(broken.items()))
        rest = f" ({len(damaged)} files are damaged)" if len(damaged) > 1 else ""
        return failed(f"{folder / name} {what}{rest}; copy or export the folder again.")
    damaged |= dict.fromkeys(unnamed_files(folder, manifest), "is not named in the manifest")
    try:
        probe = Probe.read(folder)
        model = _load(folder, probe, allow_outside, device)
        code, note = check_code(folder, manifest, read_json(folder / "config.json"), plan_of(model))
        _check_processor(folder, model.config)
        damaged |= code | differing_facts(manifest, model, probe)
        return replace(check(model, folder, damaged, probe), note=note)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        changed = f" Changed since the export: {', '.join(damaged)}." if damaged else ""
        return failed(f"{folder} cannot be replayed: {first_line(error)}.{changed}")


def verify_in_fresh_process(folder: str | Path, *, allow_outside: bool = False) -> VerifyReport:
    """Run `verify` in a Python process of its own, in which nothing but the folder describes the model.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, or its manifest is damaged.
    """
    read_manifest(folder)
    # -P: without it, files of the current folder, which may be the one to verify, would hide Python's own modules.
    command = [sys.executable, "-P", "-m", "tpcompress.export", str(folder), "--json"]
    if allow_outside:
        command.append("--allow-outside")
    path = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    try:
        return VerifyReport.from_dict(json.loads(run.stdout.strip().splitlines()[-1]))
    except (IndexError, json.JSONDecodeError):
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        return VerifyReport(str(folder), 0, {}, f"{folder} could not be verified in a fresh process: {reason}")


def main(arguments: list[str]) -> int:
    """`python -m tpcompress.export FOLDER [--json] [--allow-outside]`; exit code 0 if the folder behaves as trained."""
    folders = [a for a in arguments if not a.startswith("--")]
    if len(folders) != 1:
        sys.stderr.write("usage: python -m tpcompress.export FOLDER [--json] [--allow-outside]\n")
        return 2
    try:
        report = verify(folders[0], allow_outside="--allow-outside" in arguments)
    except (OSError, ValueError) as error:
        report = VerifyReport(folders[0], 0, {}, f"{first_line(error)}.")
    sys.stdout.write((json.dumps(asdict(report)) if "--json" in arguments else str(report)) + "\n")
    return 0 if report.ok else 1


def _attention(probe: Probe) -> str | dict[str, str | None]:
    """What `from_pretrained` takes; probes of earlier versions name the implementation of the language model alone."""
    return probe.about.get("attention_by_part") or probe.about["attention"]


def _check_processor(folder: Path, config: PretrainedConfig) -> None:
    """Check that the processor can be read, where the packages that it needs are installed.

    Raises:
        ValueError: it cannot.
    """
    if not missing_packages(family_of(config)):
        load_processor(folder)


def _load(folder: Path, probe: Probe, allow_outside: bool, device: str | None) -> Any:
    """The model in the environment of the probe, as far as this machine provides it."""
    options = {"dtype": probe.about["dtype"], "allow_outside": allow_outside}
    try:
        model: Any = load(folder, attn_implementation=_attention(probe), **options)
    except ImportError:  # e.g. flash attention is not installed; the report then names the difference
        model = load(folder, **options)
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    same = here is not None and here.type == probe.about["device"]
    return model.to(device or (probe.about["device"] if same else "cpu"))
