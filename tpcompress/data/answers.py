"""Where the answers of a conversation are in its rendered text."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tpcompress.data.rows import BadRow

Span = tuple[int, int]


def content_text(content: str | list[dict[str, str]]) -> str:
    """The text of a content in either format."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def replaced_text(message: dict[str, Any]) -> str:
    """The text of an answer: its content, or the name of the first tool that it calls."""
    content = content_text(message["content"])
    if not message.get("tool_calls") or content:
        return content
    first = message["tool_calls"][0]
    return str(first.get("function", first).get("name", ""))


def aligned(text: str, fixed: list[str], answers: list[str]) -> list[Span] | None:
    """Where the answers are in a text of fixed pieces with an answer between each two; None if that is not certain."""
    spans, cursor = [], len(fixed[0])
    if text.startswith(fixed[0]):
        for answer, after in zip(answers, fixed[1:], strict=True):
            for form in (answer, answer.strip(), answer.rstrip(), answer.lstrip()):
                if text.startswith(form + after, cursor):
                    spans.append((cursor, cursor + len(form)))
                    cursor += len(form) + len(after)
                    break
        if len(spans) == len(answers) and cursor == len(text):
            return spans
    # An answer that the template shortens, such as one without its reasoning: certain if there is one way to match.
    found = [
        re.fullmatch(any_text.join(re.escape(piece) for piece in fixed), text, re.DOTALL)
        for any_text in ("(.*?)", "(.*)")
    ]
    if found[0] is None or found[1] is None or found[0].regs != found[1].regs:
        return None
    return list(found[0].regs[1:])


def tools_of(row: Mapping[str, Any]) -> Any:
    """The tool schemas of a row; None without.

    Raises:
        BadRow: they are not JSON.
    """
    return parsed(row["tools"], "tools") if row.get("tools") else None


def parsed(text: Any, name: str) -> Any:
    """The value of a JSON text; others are returned as they are.

    Raises:
        BadRow: it is not JSON.
    """
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        raise BadRow(f"{name} are not JSON: {text[:40]!r}") from None
