"""Tables of `tpcompress list`: pruners, families, and the other kinds of parts that are found by their files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpcompress.bundled import recipes_folder
from tpcompress.errors import did_you_mean
from tpcompress.families import catalogue as of_families
from tpcompress.families import list_families
from tpcompress.families.refused import REFUSED
from tpcompress.pruners import Pruner, list_pruners, pruner_class
from tpcompress.pruners import catalogue as of_pruners
from tpcompress.pruners.registry import KINDS, list_parts

WIDE = 130
"""Columns of a terminal with room for a description beside a table."""

COUNTED = (
    "pruners", "families", "scorers", "selectors", "appliers", "losses", "teachers", "schedules", "tasks", "metrics",
    "recipes",
)  # fmt: skip


def print_list(kind: str, name: str | None, console: Console) -> None:
    """Print the members of a kind, or one of them in full.

    Args:
        kind: one of `COUNTED`, or `kinds`.
        name: member to show; None for all.
        console: console to print to.

    Raises:
        ValueError: unknown kind or name.
    """
    if kind == "pruners":
        pruner_table(console) if name is None else one_pruner(name, console)
    elif kind == "families":
        family_table(console) if name is None else one_family(name, console)
    elif kind == "kinds" and name is None:
        grid = Table.grid(padding=(0, 2))
        for each in COUNTED:
            grid.add_row(f"[bold]{each}[/bold]", str(len(_members(each))))
        console.print(grid)
        console.print("tpcompress list KIND lists one kind; tpcompress list KIND NAME shows one member.")
    else:
        members = _members(kind)
        if name is not None and name not in members:
            raise ValueError(f"No '{name}' in {kind}; known: {', '.join(members)}.{did_you_mean(name, members)}")
        if name is not None:
            console.print(f"[bold]{name}[/bold]\n\n{escape(members[name])}", highlight=False)
            return
        grid = Table.grid(padding=(0, 2))
        for key, text in members.items():
            grid.add_row(f"[bold]{key}[/bold]", escape(text.partition("\n")[0]))
        console.print(grid)


def _members(kind: str) -> dict[str, str]:
    """Members of a kind by name, each with its documentation."""
    found: Mapping[str, Any]
    if kind == "recipes":
        root = recipes_folder()
        return {path.relative_to(root).as_posix(): _recipe_text(path.read_text()) for path in _recipe_files(root)}
    if kind == "pruners":
        return {name: f"{of_pruners.retains(cls)}\n\n{of_pruners.about(cls)}" for name, cls in list_pruners().items()}
    if kind == "families":
        return {name: of_families.about(family) for name, family in list_families().items()}
    if kind.removesuffix("s") in KINDS:
        found = list_parts(kind.removesuffix("s"))
    elif kind == "losses":
        from tpcompress.training.losses import list_losses

        found = {cls.__name__: cls for cls in list_losses().values()}
    elif kind == "teachers":
        from tpcompress.training.teachers import list_teachers

        found = list_teachers()
    elif kind == "schedules":
        from tpcompress.training.schedules import list_schedules

        found = list_schedules()
    elif kind == "tasks":
        from tpcompress.evaluation.tasks import list_tasks

        found = list_tasks()
    elif kind == "metrics":
        from tpcompress.evaluation.scoring.metrics import list_metrics

        found = list_metrics()
    else:
        raise ValueError(f"No kind '{kind}' to list; known: {', '.join(COUNTED)}.{did_you_mean(kind, COUNTED)}")
    return {name: inspect.getdoc(cls) or "" for name, cls in found.items()}


def _recipe_files(root: Any) -> list[Any]:
    return sorted(root.rglob("*.yaml"))


def _recipe_text(text: str) -> str:
    """Comment at the head of a recipe, then the recipe."""
    head = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    return f"{head[0] if head else ''}\n\n{text}"


def pruner_table(console: Console) -> None:
    """Print every pruner with its properties, and the names of the components of learned ones."""
    table = Table(title="Pruners", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    wide = console.width >= WIDE
    table.add_column("pruner", no_wrap=True)
    for column in (*of_pruners.COLUMNS, *(["retains"] if wide else [])):
        table.add_column(column, no_wrap=column not in ("reads", "retains"), overflow="fold")
    for key, cls in list_pruners().items():
        words = of_pruners.facts(cls()).values()
        table.add_row(key, *words, *([escape(of_pruners.retains(cls))] if wide else []))
    console.print(table)
    console.print("Components of learned_gate:")
    for kind in KINDS:
        console.print(f"  {kind}s: {', '.join(list_parts(kind))}")
    console.print("tpcompress list pruners NAME shows one in full, with its arguments.")


def one_pruner(name: str, console: Console) -> None:
    """Print the documentation, properties and arguments of a pruner or of a component of learned ones.

    Raises:
        ValueError: unknown name.
    """
    parts: dict[str, Any] = {key: cls for kind in KINDS for key, cls in list_parts(kind).items()}
    cls = parts[name] if name in parts else pruner_class(name)
    console.print(f"[bold]{cls.name}[/bold]\n\n{escape(of_pruners.about(cls))}\n", highlight=False)
    grid = Table.grid(padding=(0, 2))
    if issubclass(cls, Pruner):
        for what, words in of_pruners.facts(cls()).items():
            grid.add_row(what, escape(words))
        grid.add_row("", of_pruners.unserved(cls()) or "")
        grid.add_row("paper plan", ", ".join(f"{plan}:paper" for plan in of_pruners.plans_of(cls)) or "none")
    for argument, default in of_pruners.arguments(cls).items():
        grid.add_row(f"[bold]{argument}[/bold]", escape(default))
    console.print(grid)


def paper_plan(name: str | None) -> str:
    """YAML of the plan with a paper's settings.

    Args:
        name: a pruner, or a further plan that a pruner declares.

    Raises:
        ValueError: there is none of that name.
    """
    plans = of_pruners.paper_plans()
    if name not in plans:
        raise ValueError(f"No plan of a paper for {name!r}; choose one of {', '.join(plans)}.")
    return plans[str(name)]


def family_table(console: Console) -> None:
    """Print every family with its properties, known limits, and refused model types."""
    known = list_families()
    columns = ("family", "model types", *of_families.COLUMNS)
    table = Table(*columns, title="Families", box=box.SIMPLE, pad_edge=False, padding=0)
    for column in table.columns[:2]:
        column.no_wrap = True
    for key, family in known.items():
        table.add_row(key, "\n".join(family.model_types), *of_families.facts(family).values())
    console.print(table)
    limits = [(key, limit) for key, family in known.items() for limit in family.limits]
    for title, pairs in (("Known limits", limits), ("Refused", list(REFUSED.items()))):
        console.print(f"[bold]{title}[/bold]")
        for reason, names in of_families.by_reason(pairs).items():
            console.print(f"- {', '.join(names)}: {escape(reason)}", highlight=False)
        console.print()
    console.print("tpcompress list families NAME shows one in full.")


def one_family(name: str, console: Console) -> None:
    """Print a family in full, with its limits.

    Raises:
        ValueError: neither a family nor a model type.
    """
    family = of_families.find(name)
    console.print(f"[bold]{family.name}[/bold]\n\n{escape(of_families.about(family))}\n")
    grid = Table.grid(padding=(0, 2))
    for what, words in (of_families.in_full(family) | {"limits": "\n".join(family.limits) or "none known"}).items():
        grid.add_row(what, escape(words))
    console.print(grid)
