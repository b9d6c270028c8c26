"""Rows that cannot be used: the exception, the counts of a data set, and the setting what to do about them."""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

log = logging.getLogger(__name__)
_SAID: set[str] = set()

OnBadRow = Literal["skip", "raise"]
MAX_SHOWN = 80  # characters of a value or file name in a message


class BadRow(ValueError):
    """A row that cannot be trained on: `str()` is `<reason>` or `<reason>: <detail>`, one line."""

    @property
    def reason(self) -> str:
        """The category of the problem, such as `missing image`."""
        return str(self).partition(": ")[0]


@dataclass
class BadRows:
    """Counts of the rows left out, by reason; `str()` is the one-line report.

    Attributes:
        total: rows in the data set; 0 if unknown (streams).
        counts: rows left out, by reason.
        examples: the first few row ids of each reason, with the detail if there is one.
        max_examples: row ids that are kept per reason.
        with_media: usable rows that hold an image or a video; None if unknown (streams).
    """

    total: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    max_examples: int = 3
    with_media: int | None = None

    def add(self, row_id: str, bad: BadRow) -> None:
        """Add one bad row to the counts."""
        self.counts[bad.reason] = self.counts.get(bad.reason, 0) + 1
        shown = self.examples.setdefault(bad.reason, [])
        if len(shown) < self.max_examples:
            detail = str(bad).partition(": ")[2]
            shown.append(f"{row_id} ({detail})" if detail else row_id)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        if not self.counts:
            return f"all {self.total} rows usable"
        shown = {reason: ", ".join(examples) for reason, examples in self.examples.items()}
        reasons = [f"{reason} {count} (e.g. {shown[reason]})" for reason, count in self.counts.items()]
        of = f" of {self.total}" if self.total else ""
        return f"{len(self)}{of} rows left out: {'; '.join(reasons)}"


def say_once(source: str, report: BadRows) -> None:
    """Log what was left out of a source: a warning if anything was, once a process for the same report."""
    line = f"{source}: {report}"
    if line not in _SAID:
        _SAID.add(line)
        log.log(logging.WARNING if len(report) else logging.INFO, "%s", line)


def check_on_bad_row(on_bad_row: str) -> None:
    """Raise a one-line ValueError unless `on_bad_row` is `skip` or `raise`."""
    if on_bad_row not in ("skip", "raise"):
        raise ValueError(f"on_bad_row must be 'skip' or 'raise', got {on_bad_row!r}.")


def bad_row_error(row_id: str, bad: BadRow) -> ValueError:
    """The error that is raised for a bad row under `on_bad_row: raise`."""
    return ValueError(f"Row {row_id} is broken: {bad}. Repair or remove it, or set on_bad_row to 'skip'.")


def shown(value: Any) -> str:
    """A value for an error message: one line, with the middle of a long text left out."""
    text = " ".join(str(value).encode("utf-8", "replace").decode().split())
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]}...{text[-MAX_SHOWN // 2 + 3 :]}"
