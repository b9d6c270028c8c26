"""The report of a comparison as data: its rows, how they differ, and JSON both ways."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tpcompress.evaluation.compare.row import Row, difference
from tpcompress.evaluation.scoring.metrics import Metric, find_metric
from tpcompress.evaluation.scoring.stats import Gain
from tpcompress.evaluation.tables import to_json


@dataclass
class Report:
    """All rows of a comparison.

    Attributes:
        rows: in the order of the comparison.
        export: {"dir": folder, "verified": whether the loaded export agreed with the trained model}, or None.
        meta: settings of the comparison; "blind" holds the blank baseline in each family.
    """

    rows: list[Row] = field(default_factory=list)
    export: dict[str, Any] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def find(
        self, arm: str, pruner: str | None = None, keep_tokens: float | None = None, layer: int = 0, seed: int = 0
    ) -> Row | None:
        """The row with these values, or None."""
        wanted = (arm, pruner, keep_tokens, layer, seed)
        return next((row for row in self.rows if row.key == wanted), None)

    def add(self, row: Row) -> None:
        """Append a row; it replaces one of the same key."""
        self.rows = [other for other in self.rows if other.key != row.key] + [row]

    def arm(self, name: str) -> list[Row]:
        """Rows of an arm."""
        return [row for row in self.rows if row.arm == name]

    def twin(self, row: Row, arm: str) -> Row | None:
        """The row of another arm with the same pruner, budget and layer; with the same seed if there is one."""
        same = [r for r in self.arm(arm) if r.recipe == row.recipe]
        return next((r for r in same if r.seed == row.seed), same[0] if same else None)

    def gain(self, row: Row) -> Gain | None:
        """A training-aware row against the same pruner without training."""
        if row.gain is not None:
            return Gain(*row.gain)
        twin = self.twin(row, "training_free")
        return None if twin is None else difference(row, twin.score, twin.ci95)

    def control_gain(self, row: Row) -> Gain | None:
        """A training-aware row against the same extra steps without the pruner, then pruned like this row."""
        if row.control_gain is not None:
            return Gain(*row.control_gain)
        twin = self.twin(row, "dense_ft")
        score, ci95 = (row.control_score, row.ci95) if twin is None else (twin.score, twin.ci95)
        return difference(row, score, ci95)

    @property
    def metric(self) -> Metric:
        """The metric of the scores."""
        return find_metric(self.meta.get("metric", "accuracy"))

    @property
    def learnt(self) -> list[str]:
        """Families that the dense base has learnt: those of the first row."""
        return list(self.rows[0].learnt) if self.rows else list(self.meta.get("learnt") or [])

    @property
    def averaged(self) -> list[str]:
        """Families that scores average: the learnt ones; all of them if there is none."""
        return self.learnt or self.families

    @property
    def families(self) -> list[str]:
        """All families, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.families))

    @property
    def blind_score(self) -> float | None:
        """The blank baseline over the families that scores average."""
        known = [v for name in self.averaged if (v := (self.meta.get("blind") or {}).get(name)) is not None]
        return sum(known) / len(known) if known else None

    def to_json(self) -> str:
        """The whole report."""
        return to_json({"rows": [asdict(row) for row in self.rows], "export": self.export, "meta": self.meta})

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`.

        Raises:
            ValueError: not a report, or one of another version.
        """
        try:
            values = json.loads(text)
            rows = values["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError("This is not a report (JSON with `rows`); remove the file to start afresh.") from error
        known = {f.name for f in fields(Row)}
        unknown = sorted({key for row in rows for key in row} - known)
        if unknown:
            raise ValueError(f"The report has unknown row keys {', '.join(unknown)}; start afresh in another folder.")
        return cls([Row(**row) for row in rows], values.get("export"), values.get("meta") or {})
