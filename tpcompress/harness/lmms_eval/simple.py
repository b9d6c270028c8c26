"""Tasks that hand over a text and a list of media: `--force_simple`, and all multiple-choice tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpcompress.harness.generation import GenerationSettings
from tpcompress.harness.prompts import Prompt


class SimpleRequests:
    """tpcompress in lmms-eval, for tasks as text and media: exports, training-free plans and dense bases."""

    is_simple = True

    def prompt(self, request: Any) -> Prompt:
        """The prompt of a request: (text, settings, function from document to media, index, task, split)."""
        context, _, to_visual, index, task, split = request.args
        return self._read(f"{task} {index}", task, context, to_visual(self.doc(task, split, index)))  # type: ignore[attr-defined]

    def settings_of(self, request: Any) -> GenerationSettings:
        """Generation settings of a request."""
        found: GenerationSettings = self.read_settings(request.args[1])  # type: ignore[attr-defined]
        return found

    def rounds(self, request: Any) -> Callable[[list[str]], Prompt | None]:
        """The prompts of a request of several rounds, which the task ends by its signal."""
        context, _, to_visual, to_text, index, task, split = request.args
        doc, state = self.doc(task, split, index), dict[str, Any](info=None)  # type: ignore[attr-defined]

        def next_prompt(told: list[str]) -> Prompt | None:
            name = f"{task} {index}, round {len(told)}"
            if not told:
                return self._read(name, task, context, to_visual(doc))
            given = to_text(doc, previous_output=list(told), round_idx=len(told), previous_round_info=state["info"])
            visuals, text, ends, _, state["info"] = given
            return None if ends else self._read(name, task, text, visuals)

        return next_prompt

    def _read(self, name: str, task: str, context: str, visuals: Any) -> Prompt:
        try:
            turns = self.turns(context, visuals)  # type: ignore[attr-defined]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        found: Prompt = self._prompt(name, task, turns)  # type: ignore[attr-defined]
        return found
