"""A cell: one named result of a table, and the key of everything that decides its value."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpcompress.evaluation.engine.fingerprint import code_digest, files_of
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.insertion.plan import PruningPlan

Settings = dict[str, Any]
"""A recipe, or a part of one."""


@dataclass(frozen=True, eq=False)
class Run:
    """A training run.

    Attributes:
        name: name of its folder.
        recipe: complete recipe, as plain values.
        plan: plan in the training loop; None trains the dense model.
        seed: seed of the run.
    """

    name: str
    recipe: Settings
    plan: PruningPlan | None
    seed: int

    def key(self, base: str) -> dict[str, Any]:
        """Everything that decides the trained weights.

        Args:
            base: hash of the base model, see `fingerprint.base_digest`.
        """
        trainer = {k: v for k, v in (self.recipe.get("trainer") or {}).items() if k != "default_root_dir"}
        recipe = self.recipe | {"trainer": trainer}
        return {
            "base": base,
            "recipe": recipe,
            "files": files_of(recipe),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "seed": self.seed,
            "code": code_digest(self.plan),
        }


@dataclass(frozen=True, eq=False)
class Made:
    """The result of a cell.

    Attributes:
        record: plain values, kept beside the key.
        scores: answers of every image; None for a cell that answers no questions.
    """

    record: dict[str, Any] = field(default_factory=dict)
    scores: Scores | None = None


@dataclass(frozen=True, eq=False)
class Cell:
    """One result. Subclasses implement `key` and `make`.

    Attributes:
        name: name of its file.
        labels: place of the result in a table, as plain values.
    """

    name: str
    labels: Mapping[str, Any]

    @property
    def runs(self) -> list[Run]:
        """The training runs that the cell needs, each once."""
        return []

    @property
    def on_model(self) -> bool:
        """The result depends on the base model and the data of the bench."""
        return True

    def key(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides the result.

        Args:
            common: hashes of base model and data, and the other settings that all cells of a folder share.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement key(common).")

    def make(self, bench: Any) -> Made:
        """Compute the result.

        Args:
            bench: the `Bench` with base model, data and trained runs.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement make(bench).")


def slug(text: str) -> str:
    """A file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def check_names(cells: Sequence[Cell]) -> None:
    """Refuse cells or runs that would share a file.

    File systems may ignore case, so names that differ in case alone count as equal.

    Raises:
        ValueError: two cells, or two different runs, have the same file name.
    """
    number = Counter(cell.name.casefold() for cell in cells)
    twice = next((cell.name for cell in cells if number[cell.name.casefold()] > 1), None)
    if twice is not None:
        raise ValueError(f"Two results would share the file '{twice}'; give one of them another name or label.")
    runs: dict[str, dict[str, Any]] = {}
    for run in {id(run): run for cell in cells for run in cell.runs}.values():
        key = {"name": run.name, "recipe": run.recipe, "plan": run.plan and run.plan.to_dict(), "seed": run.seed}
        if runs.setdefault(run.name.casefold(), key) != key:
            raise ValueError(f"Two training runs would share the folder '{run.name}'; rename one of them.")
