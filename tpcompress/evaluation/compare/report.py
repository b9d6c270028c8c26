"""The report of a comparison: rows that survive an interruption, and the files made of them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from tpcompress.evaluation.compare.findings import findings
from tpcompress.evaluation.compare.row import ARMS, Gain, Row, difference
from tpcompress.evaluation.compare.table import NAMES, Cells, index, label, layout, tokens
from tpcompress.files import write_atomic

__all__ = ["ARMS", "Gain", "Report", "Row", "findings"]


@dataclass
class Report:
    """All rows of a comparison.

    Attributes:
        rows: in the order in which they were made.
        export: {"dir": folder, "verified": whether the loaded export agreed with the trained model}, or None.
        meta: how the comparison was made; "blind" holds the blind baseline's accuracy per family.
    """

    rows: list[Row] = field(default_factory=list)
    export: dict[str, Any] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ rows

    def find(
        self, arm: str, pruner: str | None = None, keep_tokens: float | None = None, layer: int = 0, seed: int = 0
    ) -> Row | None:
        """The row of that key, or None."""
        wanted = (arm, pruner, keep_tokens, layer, seed)
        return next((row for row in self.rows if row.key == wanted), None)

    def add(self, row: Row) -> None:
        """Append a row; one of the same key gives way."""
        self.rows = [other for other in self.rows if other.key != row.key] + [row]

    def arm(self, name: str) -> list[Row]:
        """Rows of an arm."""
        return [row for row in self.rows if row.arm == name]

    def twin(self, row: Row, arm: str) -> Row | None:
        """The row of another arm with the same pruner, budget and layer; the same seed if there is one."""
        same = [r for r in self.arm(arm) if r.recipe == row.recipe]
        return next((r for r in same if r.seed == row.seed), same[0] if same else None)

    def gain(self, row: Row) -> Gain | None:
        """A training-aware row against its training-free self."""
        if row.gain is not None:
            return Gain(*row.gain)
        twin = self.twin(row, "training_free")
        return None if twin is None else difference(row, twin.score, twin.ci95)

    def control_score(self, row: Row) -> float | None:
        """What the same extra steps without the pruner reach when pruned like this row."""
        twin = self.twin(row, "dense_ft")
        return row.control_score if twin is None else twin.score

    def control_gain(self, row: Row) -> Gain | None:
        """A training-aware row against that control."""
        if row.control_gain is not None:
            return Gain(*row.control_gain)
        twin = self.twin(row, "dense_ft")
        return difference(row, self.control_score(row), row.ci95 if twin is None else twin.ci95)

    @property
    def learnt(self) -> list[str]:
        """Families that scores average: those of the first row."""
        return list(self.rows[0].learnt) if self.rows else list(self.meta.get("learnt") or [])

    @property
    def families(self) -> list[str]:
        """All families, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.families))

    @property
    def blind_score(self) -> float | None:
        """The blind baseline over the learnt families."""
        known = [v for name in self.learnt if (v := (self.meta.get("blind") or {}).get(name)) is not None]
        return sum(known) / len(known) if known else None

    # ------------------------------------------------------------------ output

    def table(self, families: bool = True) -> Table:
        """The rows as a table, with or without the families beside the mean."""
        return _rich_table(layout(self, families))

    def print(self, console: Console) -> None:
        """Print the table, in two parts where one is too wide, and the findings."""
        whole = self.table()
        if Measurement.get(console, console.options.update(width=10_000), whole).maximum <= console.width:
            console.print(whole)
        else:
            console.print(self.table(families=False))
            console.print(_rich_table(layout(self, families=True, only_families=True), gap=0))
        for sentence in self.findings():
            console.print(f"· {sentence}", markup=False, highlight=False)

    def findings(self) -> list[str]:
        """What helped and what did not, in words."""
        return findings(self)

    def to_json(self) -> str:
        """The whole report."""
        rows = [asdict(row) for row in self.rows]
        values = {"rows": rows, "export": self.export, "meta": _finite(self.meta)}
        return json.dumps(values, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is no report, or one of another version.
        """
        try:
            values = json.loads(text)
            rows = values["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError("This is no report (JSON with `rows`); remove the file to start afresh.") from error
        known = {f.name for f in fields(Row)}
        unknown = sorted({key for row in rows for key in row} - known)
        if unknown:
            raise ValueError(f"The report has unknown row keys {', '.join(unknown)}; start afresh in another folder.")
        return cls([Row(**row) for row in rows], values.get("export"), values.get("meta") or {})

    def to_csv(self) -> str:
        """One line per row; a family's accuracy is in the column `family:<name>`."""
        names = [f.name for f in fields(Row) if f.name not in ("families", "learnt")]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, "learnt", *(f"family:{name}" for name in self.families)])
        for row in self.rows:
            plain = [" ".join(map(str, v)) if isinstance(v := getattr(row, name), tuple) else v for name in names]
            writer.writerow([*plain, " ".join(row.learnt), *(row.families.get(name) for name in self.families)])
        return text.getvalue()

    def to_markdown(self) -> str:
        """Table, findings and how it was made."""
        cells = layout(self)
        lines = [f"# {cells.title}", "", "| " + " | ".join(cells.header) + " |"]
        lines.append("| --- |" + " ---: |" * (len(cells.header) - 1))
        lines += ["| " + " | ".join(values) + " |" for section in cells.sections for values in section]
        lines += ["", cells.caption, "", "## Findings", ""] + [f"- {sentence}" for sentence in self.findings()]
        lines += self._places()
        plain = {k: v for k, v in self.meta.items() if not isinstance(v, dict | list)}
        lines += ["", "## How", ""] + [f"- {key}: {value}" for key, value in plain.items()]
        notes = {row.note: row for row in self.rows if row.note}
        lines += [f"- {' '.join(filter(None, (row.arm, row.pruner)))}: {note}" for note, row in notes.items()]
        return "\n".join(lines) + "\n"

    def _places(self) -> list[str]:
        """Markdown: how evenly the tokens of pruned rows lie; nothing where no row knows."""
        rows = [row for row in self.rows if row.uniformity is not None]
        if not rows:
            return []
        lines = ["", "## Where retained tokens lie", "", "| model | tokens | places | thirds |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        for row in rows:
            name = f"{NAMES[row.arm]} {label(self, row)}"
            places = index(row.uniformity, row.uniformity_ci95)
            thirds = index(row.uniformity_thirds, row.uniformity_thirds_ci95)
            lines.append(f"| {name} | {tokens(row.retained_tokens)} | {places} | {thirds} |")
        words = (
            "Uniformity of the retained tokens, over single places and over 3 x 3 parts of the picture: 1 if each is"
        )
        words += " kept as often as any other, 0 if always the same ones are. ±: 95 % interval over images."
        return [*lines, "", words]

    def write(self, folder: str | Path) -> None:
        """Write report.json, report.csv and report.md; a reader never sees half a file."""
        texts = {"json": self.to_json(), "csv": self.to_csv(), "md": self.to_markdown()}
        for ending, text in texts.items():
            write_atomic(Path(folder) / f"report.{ending}", text)


def _rich_table(cells: Cells, gap: int = 1) -> Table:
    table = Table(
        title=cells.title, caption=cells.caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
        show_edge=False, pad_edge=False, padding=(0, gap, 0, 0),
    )  # fmt: skip
    for number, name in enumerate(cells.header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for section in cells.sections:
        for values in section:
            table.add_row(*values)
        table.add_section()
    return table


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
