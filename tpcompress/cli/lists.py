"""The lists that the command prints: pruners and the parts of learned ones, and model families."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpcompress.families import catalogue as of_families
from tpcompress.families import list_families
from tpcompress.families.refused import REFUSED
from tpcompress.pruners import Pruner, list_pruners, pruner_class
from tpcompress.pruners import catalogue as of_pruners
from tpcompress.pruners.registry import KINDS, list_parts

WIDE = 130
"""Columns of a terminal that has room for a sentence beside a table."""


def pruner_table(console: Console) -> None:
    """Every pruner with its facts, and the parts of learned ones by name."""
    table = Table(title="Pruners", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    wide = console.width >= WIDE
    table.add_column("pruner", no_wrap=True)
    for column in (*of_pruners.COLUMNS, *(["retains"] if wide else [])):
        table.add_column(column, no_wrap=column not in ("reads", "retains"), overflow="fold")
    for key, cls in list_pruners().items():
        words = of_pruners.facts(cls()).values()
        table.add_row(key, *words, *([escape(of_pruners.retains(cls))] if wide else []))
    console.print(table)
    console.print("learned_gate is made of")
    for kind in KINDS:
        console.print(f"  {'an' if kind == 'applier' else 'a'} {kind}: {', '.join(list_parts(kind))}")
    console.print("tpcompress pruners NAME shows one in full, with its arguments.")


def one_pruner(name: str, console: Console) -> None:
    """A pruner or a part of learned ones: its documentation, facts and arguments.

    Raises:
        ValueError: there is none of that name.
    """
    parts: dict[str, Any] = {key: cls for kind in KINDS for key, cls in list_parts(kind).items()}
    cls = parts[name] if name in parts else pruner_class(name)
    console.print(f"[bold]{cls.name}[/bold]\n\n{escape(of_pruners.about(cls))}\n", highlight=False)
    grid = Table.grid(padding=(0, 2))
    if issubclass(cls, Pruner):
        for what, words in of_pruners.facts(cls()).items():
            grid.add_row(what, escape(words))
        grid.add_row("", of_pruners.unserved(cls()) or "")
    for argument, default in of_pruners.arguments(cls).items():
        grid.add_row(f"[bold]{argument}[/bold]", escape(default))
    console.print(grid)


def family_table(console: Console) -> None:
    """Every family with its facts, what is known not to work, and what is refused."""
    known = list_families()
    columns = ("family", "model types", *of_families.COLUMNS)
    table = Table(*columns, title="Families", box=box.SIMPLE, pad_edge=False, padding=0)
    for key, family in known.items():
        table.add_row(key, "\n".join(family.model_types), *of_families.facts(family).values())
    console.print(table)
    limits = [(key, limit) for key, family in known.items() for limit in family.limits]
    for title, pairs in (("Known not to work", limits), ("Refused", list(REFUSED.items()))):
        console.print(f"[bold]{title}[/bold]")
        for reason, names in of_families.by_reason(pairs).items():
            console.print(f"- {', '.join(names)}: {escape(reason)}", highlight=False)
        console.print()
    console.print("tpcompress families NAME shows one in full.")


def one_family(name: str, console: Console) -> None:
    """A family in full, and its limits.

    Raises:
        ValueError: there is none of that name, and no model type.
    """
    family = of_families.find(name)
    console.print(f"[bold]{family.name}[/bold]\n\n{escape(of_families.about(family))}\n")
    grid = Table.grid(padding=(0, 2))
    for what, words in (of_families.in_full(family) | {"limits": "\n".join(family.limits) or "none known"}).items():
        grid.add_row(what, escape(words))
    console.print(grid)
