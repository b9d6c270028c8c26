"""Tables and values of files: csv, tsv, xlsx and json, as lists of records."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from tpcompress.errors import first_line

ENDINGS = (".csv", ".tsv", ".xlsx", ".json")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, with numbers as numbers; JSON of one mapping is one record, flattened with `/`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No results at {path}.")
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path}: results are read from {', '.join(ENDINGS)} files.")
    try:
        if path.suffix == ".json":
            return _of_json(json.loads(path.read_text(encoding="utf-8")))
        if path.suffix == ".xlsx":
            return _of_sheet(path)
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except (ValueError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]} ({first_line(error)}).") from error
    return [{str(key): _number(value) for key, value in row.items()} for row in rows]


def _of_json(values: Any) -> list[dict[str, Any]]:
    if isinstance(values, list):
        return [dict(_flat(each)) for each in values]
    # A data frame as JSON: a mapping of columns, each a mapping from row to value.
    columns = [value for value in values.values() if isinstance(value, Mapping)]
    same = columns and len(columns) == len(values) and all(set(column) == set(columns[0]) for column in columns)
    if same and all(str(key).isdigit() for key in columns[0]):
        return [{name: _number(column[key]) for name, column in values.items()} for key in columns[0]]
    return [dict(_flat(values))]


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}/")
        else:
            yield f"{before}{key}", _number(value)


def _of_sheet(path: Path) -> list[dict[str, Any]]:
    from openpyxl import load_workbook  # of the extra `eval`; its absence is named by `errors.missing_extra`

    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except BadZipFile as error:
        raise ValueError("not a workbook") from error
    rows = list(book.active.iter_rows(values_only=True))
    book.close()
    header = [str(name) for name in rows[0]] if rows else []
    return [dict(zip(header, map(_number, row), strict=False)) for row in rows[1:]]


def _number(value: Any) -> Any:
    """A text that is a number as a number."""
    if not isinstance(value, str):
        return value
    try:
        return float(value.strip().removesuffix("%"))
    except ValueError:
        return value
