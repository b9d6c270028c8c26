"""The model class that VLMEvalKit runs: messages in, one text out. Its base class is part of VLMEvalKit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from tpcompress.data.video import VideoSampling
from tpcompress.harness.answering import Answering
from tpcompress.harness.generation import GenerationSettings
from tpcompress.harness.prompts import Part, Prompt, Turn
from tpcompress.harness.served import ModelSettings, Served
from tpcompress.harness.tally import Tally

LOADED: list[Answerer] = []
"""Models that were loaded in this process: VLMEvalKit makes them itself, the launcher reads their counts."""


class Answerer:
    """A model of tpcompress in VLMEvalKit. It answers one message at a time, as VLMEvalKit asks.

    Args:
        max_new_tokens: longest answer.
        num_frames, fps, max_frames: how videos are sampled; a data set of videos may set its own numbers.
        use_vllm: not supported. VLMEvalKit passes it to models with certain names.
        model: fields of `ModelSettings`.

    Attributes:
        errors: errors of all calls. VLMEvalKit reports some in its log alone and goes on.
        tally: vision tokens before and after pruning, by data set.
    """

    INTERLEAVE = True
    allowed_types = ["text", "image", "video"]
    is_api = False

    def __init__(
        self,
        max_new_tokens: int = 1024,
        num_frames: int | None = 8,
        fps: float | None = None,
        max_frames: int | None = None,
        use_vllm: bool = False,
        **model: Any,
    ) -> None:
        super().__init__()
        if use_vllm:
            raise ValueError("--use-vllm is not supported for models of tpcompress; leave it out.")
        self.errors: list[str] = []
        self.tally = Tally()
        self.settings = GenerationSettings(max_new_tokens=max_new_tokens, do_sample=False)
        self.nframe, self.fps, self.max_frames = (num_frames or 0, fps or 0, max_frames)
        self.served = Served.load(ModelSettings(**model))
        self.answering = Answering(self.served)
        self.VIDEO_LLM = "video" not in self.answering.prompts.encoder.layout.refused
        LOADED.append(self)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Prompts are those of the data sets."""
        return False

    def set_dump_image(self, dump_image: Any) -> None:
        """VLMEvalKit hands over a function that writes images to files, which custom prompts need."""
        self.dump_image_func = dump_image

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to one message.

        Args:
            message: pieces `{"type": text, image or video, "value": text or path}` in order.
            dataset: name of the data set.

        Raises:
            ValueError: a message that cannot be encoded.
        """
        return self._answer([Turn("user", [Part(piece["type"], piece["value"]) for piece in message])], dataset)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The next answer of a conversation of `{"role", "content"}`, whose contents are texts or pieces."""
        return self._answer([Turn(turn["role"], _parts(turn["content"])) for turn in message], dataset)

    def chat(self, messages: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """As `chat_inner`: data sets of several turns call this."""
        return self.chat_inner(messages, dataset)

    def _answer(self, turns: Sequence[Turn], dataset: str | None) -> str:
        group = str(dataset)
        number = self.tally.sums.get(group, (0,))[0]
        try:
            self.answering.use_video(VideoSampling(self.nframe or None, self.fps or None, self.max_frames))
            (answers,) = self.answering.generate([Prompt(f"{group} {number}", turns, group)], self.settings)
        except Exception as error:
            self.errors.append(str(error))
            raise
        self.tally.add(group, answers[0])
        return answers[0].text


def _parts(content: Any) -> list[Part]:
    if isinstance(content, str):
        return [Part("text", content)]
    return [Part(piece["type"], piece["value"]) for piece in content]


@cache
def model_class() -> type:
    """The class for VLMEvalKit's table of models.

    Raises:
        ImportError: VLMEvalKit is not installed.
    """
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError as error:
        raise ImportError(
            "VLMEvalKit (vlmeval) is not installed; clone it and install it with: pip install -e VLMEvalKit.",
            name=error.name,
        ) from error
    return type("Tpcompress", (Answerer, BaseModel), {"__module__": __name__, "__doc__": Answerer.__doc__})
