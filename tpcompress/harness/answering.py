"""Answers to prompts in batches, with the vision tokens of each before and after pruning.

B prompts of a batch, S tokens of the longest, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from tpcompress.data.collate import ChatCollator, PromptCollator
from tpcompress.data.rows import BadRow
from tpcompress.data.video import VideoSampling
from tpcompress.errors import first_line
from tpcompress.evaluation.scoring.generate import Stops, cut, end_tokens
from tpcompress.families import resolve
from tpcompress.harness.generation import GenerationSettings
from tpcompress.harness.prompts import Prompt, row_of
from tpcompress.harness.served import Served
from tpcompress.inference import inference, inputs_for
from tpcompress.insertion.attach import base_of, is_attached, record
from tpcompress.insertion.trace import Trace


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt.

    Attributes:
        text: without what follows a stop text.
        input_tokens: tokens of the prompt after the last stage.
        output_tokens: new tokens, the end token included.
        vision_tokens: vision tokens of the prompt without pruning.
        retained_tokens: vision tokens after the last stage.
    """

    text: str
    input_tokens: int
    output_tokens: int
    vision_tokens: int
    retained_tokens: int


@dataclass(frozen=True)
class Likelihood:
    """How likely a given answer is.

    Attributes:
        log_likelihood: sum over its tokens, the end token included, in nats.
        tokens: their number.
        greedy: every token is the most likely one.
        vision_tokens, retained_tokens: as in `Answer`.
    """

    log_likelihood: float
    tokens: int
    greedy: bool
    vision_tokens: int
    retained_tokens: int


class Answering:
    """Runs a model on prompts.

    Args:
        served: the model.
        batch_size: prompts per call.
        video: how videos are sampled.

    Raises:
        ValueError: a batch size below 1, or a processor that cannot be collated.
    """

    def __init__(self, served: Served, batch_size: int = 1, video: VideoSampling | None = None) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}.")
        self.model, self.processor = served.model, served.processor
        self.batch_size, self.video = batch_size, video
        self.prompts = PromptCollator(served.processor, video=video)
        self.marks = torch.tensor(list(resolve(base_of(served.model)).placeholder_ids.values()))
        self.ends = sorted(end_tokens(served.model, served.processor))

    def use_video(self, video: VideoSampling | None) -> None:
        """Sample videos in another way from now on."""
        self.video = self.prompts.encoder.video = video

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> Iterator[list[Answer]]:
        """Answers, batch by batch, in the order of the prompts.

        Raises:
            ValueError: a prompt that cannot be encoded.
        """
        for start in range(0, len(prompts), self.batch_size):
            yield self._generate(prompts[start : start + self.batch_size], settings)

    def score(self, prompts: Sequence[tuple[Prompt, str]]) -> Iterator[list[Likelihood]]:
        """How likely given answers are, batch by batch.

        Raises:
            ValueError: a prompt that cannot be encoded.
        """
        for start in range(0, len(prompts), self.batch_size):
            yield self._score(prompts[start : start + self.batch_size])

    def _generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Answer]:
        batch = _batch(self.prompts, [(prompt, None) for prompt in prompts])
        ids_BS, options = batch["input_ids"], settings.arguments()
        width, beams = ids_BS.shape[1], settings.num_beams
        if settings.until:
            stops = Stops(self.processor.tokenizer, settings.until, width)
            options["stopping_criteria"] = StoppingCriteriaList([stops])
        call = {**inputs_for(self.model, batch), **options, "pad_token_id": self.prompts.pad_id}
        with inference(self.model), record(self.model) if is_attached(self.model) else nullcontext() as trace:
            out = self.model.generate(**call, eos_token_id=self.ends)  # type: ignore[operator]
        new_BN = out[:, width:].cpu()
        ended = torch.isin(new_BN, torch.tensor(self.ends)).long()
        output = ((ended.cumsum(1) - ended) == 0).sum(1).tolist()
        decoder = self.processor.tokenizer
        texts = decoder.batch_decode(new_BN, skip_special_tokens=settings.skip_special_tokens)
        before, after = self._counts(ids_BS, trace, beams)
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = zip(texts, lengths, output, before, after, strict=True)
        return [Answer(cut(text, settings.until), n - b + a, o, b, a) for text, n, o, b, a in rows]

    def _score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Likelihood]:
        batch = _batch(ChatCollator(self.processor, learn_from="last", video=self.video), pairs)
        inputs = inputs_for(self.model, batch)
        labels_BN, trace = inputs["labels"], None
        with inference(self.model):
            if is_attached(self.model):  # labels mark the end of the prompt, and are shortened like the logits
                with record(self.model) as trace:
                    logits = self.model(**inputs, use_cache=False).logits
                labels_BN = labels_BN if trace.labels_BN is None else trace.labels_BN
            else:
                del inputs["labels"]
                logits = self.model(**inputs, use_cache=False).logits
        before, after = self._counts(batch["input_ids"], trace, 1)
        found = []
        for logits_NC, labels_N, b, a in zip(logits[:, :-1], labels_BN[:, 1:], before, after, strict=True):
            told = labels_N != -100
            logs_TC, target_T = logits_NC[told].float().log_softmax(-1), labels_N[told]
            each_T = logs_TC.gather(1, target_T[:, None])
            greedy = bool((logs_TC.argmax(1) == target_T).all())
            found.append(Likelihood(float(each_T.sum()), len(target_T), greedy, b, a))
        return found

    def _counts(self, ids_BS: Tensor, trace: Trace | None, copies: int) -> tuple[list[int], list[int]]:
        """Vision tokens of every prompt before and after pruning."""
        before = torch.isin(ids_BS, self.marks).sum(1).tolist()
        if trace is None or not trace.stages:
            return before, before
        last = max(stage.stage for stage in trace.stages)
        stage = next(stage for stage in trace.stages if stage.stage == last)
        after = [0] * len(before)
        for owner, count in zip(stage.owner, stage.vision_out, strict=True):
            if owner % copies == 0:  # beams of a prompt are copies of it
                after[owner // copies] += count
        return before, after


def _batch(collator: Any, pairs: Sequence[tuple[Prompt, str | None]]) -> dict[str, Any]:
    """Inputs of the model for prompts and, for a training collator, their answers.

    Raises:
        ValueError: a prompt that cannot be encoded.
    """
    sequences = []
    for prompt, answer in pairs:
        try:
            sequences += collator.encode(row_of(prompt, answer))
        except BadRow as bad:
            raise ValueError(f"{prompt.name} cannot be encoded: {first_line(bad)}.") from None
    batch = collator.pad([(sequences, [])])
    return {name: value for name, value in batch.items() if name != "meta"}
