"""`verify`: does a folder still behave as the trained model did, and if not, which stage differs first?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tpcompress.errors import first_line
from tpcompress.export.budgets import words
from tpcompress.export.folder import damaged_files, read_manifest, unusable_files
from tpcompress.export.probe import Probe, environment, record_probe
from tpcompress.export.probe_diff import Comparison

PACKAGE = Path(__file__).resolve().parent.parent.parent
"""The folder that tpcompress is imported from."""


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `str(report)` is the line to print.

    Attributes:
        folder: that was verified.
        files: number of files in the manifest.
        damaged: what is wrong with which file.
        error: why the probe could not be replayed, if it could not.
        replay: the replay beside the trained model; None if there was none.
        others: the same at the other budgets that the probe holds, by budget; none if the first replay differs.
        suspects: likely reasons of a difference.
    """

    folder: str
    files: int
    damaged: dict[str, str]
    error: str | None = None
    replay: Comparison | None = None
    others: dict[str, Comparison] = field(default_factory=dict)
    suspects: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """The folder is whole and behaves as trained."""
        replayed = self.error is None and self.replay is not None and self.replay.differs is None
        return replayed and not self.damaged and self._other is None

    @property
    def _other(self) -> str | None:
        """The first of the other budgets at which the two differ."""
        return next((budget for budget, found in self.others.items() if found.differs is not None), None)

    def __str__(self) -> str:
        if self.error is not None or self.replay is None:
            return self.error or f"{self.folder} was not replayed."
        likely = f" Likely: {'; '.join(self.suspects)}." if self.suspects else ""
        if self.replay.differs is not None:
            return f"Export differs from the trained model first {self.replay.differs}.{likely}"
        if self._other is not None:
            found = self.others[self._other].differs
            return f"At {self._other} the export differs from the trained model first {found}.{likely}"
        if self.damaged:
            changes = "; ".join(f"{name} {what}" for name, what in self.damaged.items())
            return f"{self.folder} behaves as trained in its probe, but it was changed: {changes}."
        kept = ", ".join(str(stage.retained) for stage in self.replay.stages)
        also = f", also at {' and '.join(self.others)}" if self.others else ""
        return (
            f"{self.folder} behaves as the trained model: its stages retain the same vision tokens ({kept} in the "
            f"probe{also}), max logit gap {self.replay.logit_gap:.2g}, all {self.files} files are whole."
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VerifyReport:
        """The inverse of `dataclasses.asdict`."""
        replay = None if values["replay"] is None else Comparison.from_dict(values["replay"])
        others = {budget: Comparison.from_dict(found) for budget, found in values["others"].items()}
        return cls(**values | {"replay": replay, "others": others, "suspects": tuple(values["suspects"])})


def verify(folder: str | Path, *, allow_outside: bool = False, device: str | None = None) -> VerifyReport:
    """Check every file of an export and replay its probe, in the dtype and attention implementation of training.

    Args:
        folder: local folder.
        allow_outside: import pruners that are not part of tpcompress.
        device: where to run; without it the kind of device that the probe was made on, if there is one here.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, or its manifest is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    damaged = damaged_files(folder, manifest, hashes=True)
    broken = unusable_files(damaged, folder)

    def failed(error: str) -> VerifyReport:
        return VerifyReport(str(folder), len(manifest["files"]), damaged, error)

    if broken:
        name, what = next(iter(broken.items()))
        rest = f" ({len(damaged)} files are damaged)" if len(damaged) > 1 else ""
        return failed(f"{folder / name} {what}{rest}; copy or export the folder again.")
    try:
        probe = Probe.read(folder)
        return check(_load(folder, probe, allow_outside, device), folder, damaged, probe)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        changed = f" Changed since the export: {', '.join(damaged)}." if damaged else ""
        return failed(f"{folder} cannot be replayed: {first_line(error)}{changed}")


def check(model: Any, folder: Path, damaged: dict[str, str] | None = None, probe: Probe | None = None) -> VerifyReport:
    """Replay a folder's probe on a loaded model.

    Args:
        model: loaded from the folder, however.
        folder: local folder.
        damaged: what is known of its files.
        probe: the folder's, if it was read already.

    Raises:
        FileNotFoundError, ValueError: the folder has no manifest or probe, or they are damaged.
    """
    manifest, probe = read_manifest(folder), probe or Probe.read(folder)
    replay = Comparison.of(probe, record_probe(model, probe.inputs))
    others = {}
    if replay.differs is None:
        for other in probe.others:
            now = record_probe(model, probe.inputs, other.budgets)
            others[words(other.budgets)] = Comparison.of(other, now)
    suspects = _suspects(probe, environment(model), damaged or {})
    return VerifyReport(str(folder), len(manifest["files"]), dict(damaged or {}), None, replay, others, suspects)


def verify_in_fresh_process(folder: str | Path, *, allow_outside: bool = False) -> VerifyReport:
    """`verify` in a Python process of its own, which knows nothing but the folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an export, or its manifest is damaged.
    """
    read_manifest(folder)
    command = [sys.executable, "-m", "tpcompress.export", str(folder), "--json"]
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
        report = VerifyReport(folders[0], 0, {}, first_line(error))
    sys.stdout.write((json.dumps(asdict(report)) if "--json" in arguments else str(report)) + "\n")
    return 0 if report.ok else 1


def _load(folder: Path, probe: Probe, allow_outside: bool, device: str | None) -> Any:
    """The model in the circumstances of the probe, as far as this machine has them."""
    from tpcompress.export.load import load

    options = {"dtype": probe.about["dtype"], "allow_outside": allow_outside}
    try:
        model: Any = load(folder, attn_implementation=probe.about["attention"], **options)
    except ImportError:  # e.g. no flash attention here; the report then names it
        model = load(folder, **options)
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    same = here is not None and here.type == probe.about["device"]
    return model.to(device or (probe.about["device"] if same else "cpu"))


def _suspects(probe: Probe, now: dict[str, str], damaged: dict[str, str]) -> tuple[str, ...]:
    """Likely reasons, in the order in which they are worth a look."""
    found = [f"changed files ({', '.join(damaged)})"] if damaged else []
    names = {"dtype": "dtype", "attention": "attention implementation", "device": "device"}
    names |= {"transformers": "transformers version", "torch": "torch version"}
    for key, name in names.items():
        if probe.about[key] != now[key]:
            found.append(f"{name} (trained {probe.about[key]}, loaded {now[key]})")
    return tuple(found)
