"""Tasks that hand over messages: the usual way of lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpcompress.harness.generation import GenerationSettings
from tpcompress.harness.prompts import Part, Prompt, Turn

HINT = "run with --force_simple, where such marks are the places of the images"


class ChatRequests:
    """tpcompress in lmms-eval, for tasks as messages: exports, training-free plans and dense bases."""

    is_simple = False

    def prompt(self, request: Any) -> Prompt:
        """The prompt of a request: (text, function from document to messages, settings, index, task, split)."""
        _, to_messages, _, index, task, split = request.args
        return self._read(f"{task} {index}", task, to_messages(self.doc(task, split, index)))  # type: ignore[attr-defined]

    def settings_of(self, request: Any) -> GenerationSettings:
        """Generation settings of a request."""
        found: GenerationSettings = self.read_settings(request.args[2])  # type: ignore[attr-defined]
        return found

    def rounds(self, request: Any) -> Callable[[list[str]], Prompt | None]:
        """The prompts of a request of several rounds; a task ends them by its signal, or by returning no round."""
        _, to_messages, _, index, task, split = request.args
        doc, state = self.doc(task, split, index), dict[str, Any](info=None)  # type: ignore[attr-defined]

        def next_prompt(told: list[str]) -> Prompt | None:
            if not told:
                messages = to_messages(doc)
            else:
                given = to_messages(
                    doc, round_idx=len(told), previous_output=list(told), previous_round_info=state["info"]
                )
                if not (isinstance(given, tuple) and len(given) == 4):
                    return None
                messages, ends, _, state["info"] = given
                if ends:
                    return None
            return self._read(f"{task} {index}, round {len(told)}", task, messages)

        return next_prompt

    def _read(self, name: str, task: str, messages: Sequence[Mapping[str, Any]]) -> Prompt:
        try:
            turns = [Turn(message["role"], [_part(piece) for piece in message["content"]]) for message in messages]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name}: the task gives no messages with role and content ({error!r}).") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        found: Prompt = self._prompt(name, task, turns)  # type: ignore[attr-defined]
        return found


def _part(piece: Mapping[str, Any]) -> Part:
    kind = piece["type"]
    if kind == "text":
        if "<image>" in piece["text"] or "<video>" in piece["text"]:
            raise ValueError(f"a text holds the mark of an image or video; {HINT}.")
        return Part("text", piece["text"])
    if kind not in ("image", "video"):
        raise ValueError(f"no {kind} support; tasks of text, images and videos can be run.")
    if piece.get("start_time") is not None or piece.get("end_time") is not None:
        raise ValueError("parts of a video (start_time, end_time) are not supported; cut the file beforehand.")
    return Part(kind, piece["url"])
