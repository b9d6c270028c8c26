"""Docstrings as Markdown: paragraphs, indented formulas as code blocks, Google sections as tables or lists."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
LABEL = re.compile(r"(needs|gives|Unlike the official code[^:]{0,60}:|[A-Z][\w ]{2,28}:)(?=\s)")
"""How a line begins that is a paragraph of its own, such as `Paper: ...` or `Cost: ...`."""
WORDS = {"needs": "Needs:", "gives": "Returns:"}
"""Labels that are written differently on a page."""
INDENT = "    "
HIDE_CONTENTS = "---\nhide:\n  - toc\n---\n"
"""Front matter of pages with wide tables."""


@dataclass
class Docstring:
    """One docstring in parts.

    Attributes:
        body: Markdown of everything outside the sections.
        sections: entries of each Google section by name; an entry without a name has the key "".
    """

    body: str = ""
    sections: dict[str, dict[str, str]] = field(default_factory=dict)


def module_docstring(cls: type) -> str:
    """Docstring of the file in which a class is defined."""
    return inspect.getdoc(sys.modules[cls.__module__]) or ""


def own_docstring(cls: type) -> str:
    """Docstring of a class without its base classes."""
    return inspect.cleandoc(cls.__dict__.get("__doc__") or "")


def parse(text: str) -> Docstring:
    """Split a docstring into Markdown text and Google sections."""
    body: list[str] = []
    found = Docstring()
    section = ""
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line[:-1]
            lines[section] = []
        elif section and (line.startswith(INDENT) or not line):
            lines[section].append(line.removeprefix(INDENT))
        else:
            section = ""
            body.append(line)
    found.body = _markdown(body)
    found.sections = {name: _entries(listed) for name, listed in lines.items()}
    return found


def escape(text: str) -> str:
    """Text with Markdown and HTML characters outside of code spans escaped."""
    parts = re.split(r"(`[^`]*`)", text)
    for number in range(0, len(parts), 2):
        plain = re.sub(r"(?<!\w)\*(\w+)\*(?!\w)", r"\1", parts[number])  # emphasis of one word
        parts[number] = re.sub(r"([*_|\[\]])", r"\\\1", plain).replace("<", "&lt;")
    return "".join(part.replace("|", "\\|") if part.startswith("`") else part for part in parts)


def cell(text: Any) -> str:
    """Text for a cell of a Markdown table."""
    return escape(" ".join(str(text).split()))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _entries(lines: list[str]) -> dict[str, str]:
    """Entries of a section: `name: text` with continuation lines indented."""
    found: dict[str, str] = {}
    name = ""
    for line in filter(None, lines):
        match = re.match(r"(\w+): (.*)", line)
        if match and not line.startswith(INDENT):
            name = match[1]
            found[name] = match[2]
        else:
            found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


def _markdown(lines: list[str]) -> str:
    """Paragraphs and lists; indented lines become a code block."""
    blocks: list[str] = []
    paragraph: list[str] = []
    code: list[str] = []

    def flush() -> None:
        if paragraph:
            blocks.append(_paragraph(" ".join(paragraph)))
            paragraph.clear()
        if code:
            blocks.append(_indented(inspect.cleandoc("\n".join(["", *code]))))
            code.clear()

    for line in _separated(lines):
        indented = line.startswith(INDENT) or (line.startswith("  ") and not paragraph)
        listed = line.startswith("- ")
        open_end = bool(paragraph) and not paragraph[-1].endswith((":", "."))
        continues = indented and bool(paragraph) and (paragraph[0].startswith("- ") or open_end)
        if not line.strip():
            flush()
        elif indented and not continues:
            if paragraph:
                flush()
            code.append(line)
        else:
            if code or listed or LABEL.match(line):
                flush()
            paragraph.append(line.strip())
    flush()
    joined = "\n\n".join(blocks)
    return re.sub(r"(?m)^(- .*)\n\n(?=- )", r"\1\n", joined)


def _indented(text: str) -> str:
    """A block of indented lines: terms with their meaning as a table, everything else as code."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        term = re.match(r"(\S+(?: \S+)?) {2,}(\S.*)", line)
        if term and " = " not in term[1]:
            rows.append([term[1], term[2]])
        elif rows and line.startswith("  "):
            rows[-1][1] += f" {line.strip()}"
        else:
            return f"```text\n{text}\n```"
    if len(rows) < 2 or any("=" in term for term, _ in rows):
        return f"```text\n{text}\n```"
    return table(["Value", "Meaning"], [[f"`{term}`", cell(meaning)] for term, meaning in rows])


def _separated(lines: list[str]) -> Iterator[str]:
    """Lines with labels in their middle (`Paper: ...     Cost: ...`) on lines of their own."""
    for line in lines:
        if line.startswith(INDENT):
            yield line
        else:
            yield from re.sub(
                r"(?:\s{3,}|(?<=\.) )(?=(?:gives|keep =|Cost:|Unlike the official code)\s)", "\n", line
            ).split("\n")


def _paragraph(text: str) -> str:
    listed = text.startswith("- ")
    text = re.sub(r"\s{3,}", " · ", text.removeprefix("- "))
    match = LABEL.match(text)
    if match:
        return f"**{escape(WORDS.get(match[1], match[1]))}** {escape(text[match.end() :].strip())}"
    return ("- " if listed else "") + escape(text)
