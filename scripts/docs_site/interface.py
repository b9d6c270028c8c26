"""Reference pages of the command line and of the Python interface, generated from signatures and docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import tpcompress as tp
from docs_site.docstrings import cell, escape, own_docstring, parse, table
from tpcompress.cli.commands import GROUPS, RECIPE_COMMANDS
from tpcompress.cli.help import examples
from tpcompress.export.bake import export


def pages() -> dict[str, str]:
    """Markdown of both pages by path."""
    return {"reference/commands.md": _commands(), "reference/python.md": _python()}


def _commands() -> str:
    lines = [
        "# Command line\n",
        "`tpcompress COMMAND --help` prints the same. `--traceback` shows where an error came from.\n",
    ]
    for title, commands in GROUPS.items():
        lines.append(f"## {title}\n")
        for name, command in commands.items():
            lines.append(_command(name, command))
    return "\n".join(lines)


def _command(name: str, command: Callable[..., int]) -> str:
    text = inspect.getdoc(command) or ""
    lines = [f"### {name}\n", f"{escape(text.partition(chr(10))[0])}\n", "```bash", *examples(command), "```\n"]
    if name in RECIPE_COMMANDS:
        lines.append("Options are the settings of a [recipe](recipes/index.md), such as `--trainer.max_steps 100`.\n")
        return "\n".join(lines)
    meanings = parse(text).sections.get("Args", {})
    rows = [
        [f"`--{option.replace('_', '-')}`", _default(parameter), cell(meanings.get(option, ""))]
        for option, parameter in inspect.signature(command).parameters.items()
    ]
    return "\n".join([*lines, table(["Option", "Default", "Meaning"], rows) if rows else ""])


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    return "" if parameter.default is None else f"`{parameter.default}`"


def _python() -> str:
    lines = [
        "# Python interface\n",
        "`import tpcompress as tp` gives these names; importing it loads neither torch nor transformers.\n",
    ]
    found = {name: export if name == "export" else getattr(tp, name) for name in tp.__all__}
    for title, wanted in (("Functions", inspect.isroutine), ("Classes", inspect.isclass)):
        lines.append(f"## {title}\n")
        for name, value in found.items():
            if wanted(value):
                lines.append(_entry(name, value))
    return "\n".join(lines)


def _entry(name: str, value: Any) -> str:
    text = own_docstring(value) if inspect.isclass(value) else inspect.getdoc(value) or ""
    parsed = parse(text)
    lines = [f"### tp.{name}\n"]
    if not inspect.isclass(value):
        lines.append(f"```python\n{_call(name, inspect.signature(value).parameters)}\n```\n")
    lines.append(parsed.body + "\n")
    for section in ("Args", "Attributes"):
        entries = parsed.sections.get(section)
        if entries:
            lines.append(table(["Name", "Meaning"], [[f"`{key}`", cell(each)] for key, each in entries.items()]))
    for section in ("Returns", "Raises"):
        for key, each in parsed.sections.get(section, {}).items():
            lines.append(f"**{section}** {f'`{key}`: ' if key else ''}{escape(each)}\n")
    return "\n".join(lines)


def _call(name: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """A call with names and defaults, without types."""
    words, keyword_only = [], False
    for parameter in parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        star = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        keyword_only = keyword_only or parameter.kind is parameter.VAR_POSITIONAL
        given = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        words.append(f"{star}{parameter.name}{given}")
    return f"tp.{name}({', '.join(words)})"
