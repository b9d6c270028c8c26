"""Processors without a chat template that take a question and its answer as `text` and `suffix`, as PaliGemma's does.

They make the labels themselves: the question is read in both directions, the answer is learned.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from tpcompress.data.rows import BadRow
from tpcompress.data.template import MARKERS, ChatTemplate, Rendered


class SuffixFormat:
    """Turns a conversation of one question and one answer into the text and the suffix of a processor.

    Args:
        processor: processor that takes a `suffix`.
    """

    appended_end = ""  # the processor appends its own

    def __init__(self, processor: Any) -> None:
        self.name = type(processor).__name__
        self.processor = processor

    def conversation(
        self, messages: Sequence[dict[str, str]], counts: dict[str, int], tools: Any = None, prompt: bool = False
    ) -> Rendered:
        """See `ChatTemplate.conversation`.

        Raises:
            BadRow: the conversation is not one question with one answer.
        """
        roles = [message["role"] for message in messages]
        if roles not in (["user", "assistant"], ["user"]) or tools or counts["video"]:
            raise BadRow(f"not one question and one answer: {self.name} takes no {' '.join(roles)}")
        question = messages[0]["content"]
        found = question.count(MARKERS["image"])
        if found not in (0, counts["image"]) or (found and not counts["image"]):
            raise BadRow(f"image markers: {found} for {counts['image']} images")
        text = self.processor.image_token * counts["image"] + question.replace(MARKERS["image"], "").strip()
        return Rendered(text, [], {} if prompt else {"suffix": messages[-1]["content"]})


def text_format(processor: Any, learn_from: str) -> ChatTemplate | SuffixFormat:
    """How conversations become the text of a processor.

    Raises:
        ValueError: it has neither a usable chat template nor a suffix.
    """
    has_template = processor.chat_template or processor.tokenizer.chat_template
    if not has_template and "suffix" in inspect.signature(type(processor).__call__).parameters:
        return SuffixFormat(processor)
    return ChatTemplate(processor, learn_from)  # type: ignore[arg-type]
