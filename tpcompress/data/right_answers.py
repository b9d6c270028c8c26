"""Right answers of a record for evaluation, where the last turn is not the only one."""

import json
from typing import Any

from tpcompress.data.bad_rows import BadRow, shown
from tpcompress.data.messages import listed, text_of

REFERENCE_COLUMNS = ("references", "answers")


def right_answers(record: dict[str, Any], number: int) -> list[list[str]] | None:
    """The right answers of every conversation: columns `references` or `answers`; None without them.

    They are one text or a list of texts for a record of one conversation, and a list of texts or of such lists for one
    of several. Entries may be dictionaries with `answer`, as in VQAv2, and all may be JSON text.

    Args:
        record: columns of a record.
        number: of its conversations.

    Raises:
        BadRow: `references` are not those of the conversations. Such `answers` are left out, as they may be something
            else.
    """
    name = next((name for name in REFERENCE_COLUMNS if record.get(name)), None)
    if name is None:
        return None
    given = record[name]
    if isinstance(given, str) and given[:1] in ("[", "{"):
        try:
            given = json.loads(given)
        except ValueError:  # an answer that starts with a bracket, such as a box
            pass
        else:
            # A box in brackets is JSON too, but it is one answer.
            numbers = isinstance(given, list) and all(isinstance(entry, int | float) for entry in given)
            given = record[name] if numbers else given
    nested = isinstance(given, list) and all(isinstance(entry, list | tuple) for entry in given)
    each = nested or (number > 1 and isinstance(given, list) and len(given) == number)
    found = [_texts(entry) for entry in given] if each else [_texts(given)]
    if len(found) == number and all(found):
        return found
    if name == "references":
        raise BadRow(
            f"references: {shown(given)} are not right answers of {number} conversations; give one list of texts for "
            "each, for its last answer, which is the one that is scored"
        )
    return None


def most_common(answers: Any) -> str:
    """The answer that occurs most often; empty without one."""
    texts = _texts(answers)
    return max(texts, key=texts.count) if texts else ""


def _texts(value: Any) -> list[str]:
    entries = value.get("text", value.get("answer")) if isinstance(value, dict) else value
    texts = [text_of(entry.get("answer") if isinstance(entry, dict) else entry) for entry in listed(entries)]
    return [text for text in texts if text]
