"""Choice letter: multiple choice, where the letter counts and not the words around it."""

from __future__ import annotations

import re

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply
from tpcompress.evaluation.scoring.text import collapsed

_STATED = re.compile(r"(?:answer|option|choice)\s*(?:is|:)?\s*[(\[]?([A-Z])(?![a-z])", re.IGNORECASE)
_LEADING = re.compile(r"\s*[(\[]?([A-Za-z])(?:[)\].:,]|\s*$)")
_LONE = re.compile(r"(?<![\w'])[(\[]?([A-Z])[)\]]?(?![\w'])")
_OPTION = re.compile(r"^\s*[(\[]?([A-Z])[)\].:]\s*(.+?)\s*$", re.MULTILINE)


def letter_of(text: str, prompt: str = "") -> str | None:
    """The letter that an answer chooses.

    In this order: the letter at its start (`B`, `(B)`, `b.`), one that is announced (`the answer is B`), the option of
    the prompt that it repeats, the only capital letter that stands alone. None if there is none.
    """
    text = text.strip()
    if match := _LEADING.match(text):
        return match.group(1).upper()
    if match := _STATED.search(text):
        return match.group(1).upper()
    options = {collapsed(words).rstrip("."): letter for letter, words in _OPTION.findall(prompt)}
    if (repeated := options.get(collapsed(text).rstrip("."))) is not None:
        return repeated
    lone = set(_LONE.findall(text)) - {"I", "A"} or set(_LONE.findall(text)) - {"I"}
    return lone.pop() if len(lone) == 1 else None


class ChoiceLetter(Metric):
    """1 if the answer chooses the letter of a reference, else 0."""

    name = "choice_letter"
    title = "Right choices"
    applies_to = "a letter or an option of its question"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        wanted = {letter_of(reference, reply.prompt) for reference in reply.references} - {None}
        return float(letter_of(reply.text, reply.prompt) in wanted), float(bool(wanted))
