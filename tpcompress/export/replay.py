"""Replay of a folder's probe on a loaded model, and the report of it: where does the export differ, and why?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpcompress.export.budgets import words
from tpcompress.export.folder import read_manifest
from tpcompress.export.probe import Probe, environment, record_probe
from tpcompress.export.probe_diff import ProbeDiff

ENVIRONMENT = {
    "dtype": "dtype",
    "attention": "attention implementation",
    "device": "device",
    "transformers": "transformers version",
    "torch": "torch version",
}
"""Settings that can change a replay, by their key in probe.json, most likely first."""


@dataclass(frozen=True)
class VerifyReport:
    """Result of `verify`; `str(report)` is one line.

    Attributes:
        folder: verified folder.
        files: number of files in the manifest.
        damaged: what is wrong with each damaged file.
        error: why the probe could not be replayed, or None.
        replay: difference from the recorded model; None without a replay.
        others: the same at the other budgets of the probe, by budget; empty if `replay` differs.
        suspects: likely reasons of a difference.
        model: what the probe was recorded from: the trained model, or the model that was exported untrained.
        note: what else is to be said about an intact folder, a sentence after a space; or empty.
    """

    folder: str
    files: int
    damaged: dict[str, str]
    error: str | None = None
    replay: ProbeDiff | None = None
    others: dict[str, ProbeDiff] = field(default_factory=dict)
    suspects: tuple[str, ...] = ()
    model: str = "the exported model"
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether all files are intact, the model behaves as recorded, and its plan drops vision tokens."""
        replayed = self.error is None and self.replay is not None and self.replay.differs is None
        return replayed and not self.damaged and self._other is None and self.prunes

    @property
    def prunes(self) -> bool:
        """Whether a vision token of the probe was dropped, at one of its budgets."""
        replays = [] if self.replay is None else [self.replay, *self.others.values()]
        return any(replay.prunes for replay in replays)

    @property
    def _other(self) -> str | None:
        """The first of the other budgets with a difference."""
        return next((budget for budget, found in self.others.items() if found.differs is not None), None)

    def __str__(self) -> str:
        if self.error is not None or self.replay is None:
            return self.error or f"{self.folder} was not replayed."
        likely = f" Likely: {'; '.join(self.suspects)}." if self.suspects else ""
        if self.replay.differs is not None:
            return f"Export differs from {self.model} first {self.replay.differs}.{likely}"
        if self._other is not None:
            found = self.others[self._other].differs
            return f"At {self._other} the export differs from {self.model} first {found}.{likely}"
        if self.damaged:
            changes = "; ".join(f"{name} {what}" for name, what in self.damaged.items())
            return f"{self.folder} behaves as {self.model} on its probe, but files were changed: {changes}."
        if not self.prunes:
            return (
                f"{self.folder} prunes nothing: its stages retain all {self.replay.stages[-1].total} vision tokens of "
                f"the probe. Export it again with a smaller budget."
            )
        kept = ", then ".join(f"{stage.retained} of {stage.total}" for stage in self.replay.stages)
        also = f", also at {' and '.join(self.others)}" if self.others else ""
        return (
            f"{self.folder} behaves as {self.model}: its stages retain the same vision tokens ({kept} in the "
            f"probe{also}), max logit gap {self.replay.logit_gap:.2g}, all {self.files} files are intact.{self.note}"
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VerifyReport:
        """Rebuild a report from `dataclasses.asdict`."""
        replay = None if values["replay"] is None else ProbeDiff.from_dict(values["replay"])
        others = {budget: ProbeDiff.from_dict(found) for budget, found in values["others"].items()}
        return cls(**values | {"replay": replay, "others": others, "suspects": tuple(values["suspects"])})


def check(model: Any, folder: Path, damaged: dict[str, str] | None = None, probe: Probe | None = None) -> VerifyReport:
    """Replay a folder's probe on a loaded model.

    Args:
        model: loaded from the folder.
        folder: local folder.
        damaged: damage of its files, if known.
        probe: the folder's probe, if already read.

    Raises:
        FileNotFoundError: the folder has no manifest or probe.
        ValueError: they are damaged.
    """
    manifest, probe = read_manifest(folder), probe or Probe.read(folder)
    replay = ProbeDiff.of(probe, record_probe(model, probe.inputs))
    others = {}
    if replay.differs is None:
        for other in probe.others:
            now = record_probe(model, probe.inputs, other.budgets)
            others[words(other.budgets)] = ProbeDiff.of(other, now)
    suspects = _suspects(probe, environment(model), damaged or {})
    model = "the trained model" if manifest.get("trained_with") else "the exported model"
    return VerifyReport(str(folder), len(manifest["files"]), dict(damaged or {}), None, replay, others, suspects, model)


def _suspects(probe: Probe, now: dict[str, str], damaged: dict[str, str]) -> tuple[str, ...]:
    """Likely reasons of a difference, most likely first."""
    found = [f"changed files ({', '.join(damaged)})"] if damaged else []
    for key, name in ENVIRONMENT.items():
        if probe.about[key] != now[key]:
            found.append(f"{name} (recorded {probe.about[key]}, loaded {now[key]})")
    return tuple(found)
