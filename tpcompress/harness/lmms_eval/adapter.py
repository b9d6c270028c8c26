"""The model of lmms-eval: requests in, answers out, with token counts; independent of how tasks hand over prompts."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from tpcompress.data.video import VideoSampling
from tpcompress.errors import did_you_mean
from tpcompress.harness.answering import Answer, Answering
from tpcompress.harness.generation import GenerationSettings
from tpcompress.harness.lmms_eval.log import log
from tpcompress.harness.lmms_eval.results import generation_result, log_means
from tpcompress.harness.prompts import Part, Prompt, Turn, interleaved, sorted_media
from tpcompress.harness.served import ModelSettings, Served, plan_text
from tpcompress.harness.tally import Tally
from tpcompress.inference import default_device

OPTIONS = ("max_new_tokens", "ignore_gen_kwargs", "num_frames", "fps", "max_frames", "system_prompt")
"""Arguments of the model beside those of `ModelSettings`."""

MODEL_OPTIONS = tuple(field.name for field in fields(ModelSettings))


def device_of_rank(device: str | None) -> str:
    """The device of this process: of several processes, each takes the accelerator of its local rank."""
    found = device or default_device()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and found != "cpu" and ":" not in found
    return f"{found}:{os.environ.get('LOCAL_RANK', 0)}" if several else found


class Adapter:
    """Runs a model of tpcompress in lmms-eval.

    Subclasses implement `prompt` and `rounds`, see `chat` and `simple`.

    Args:
        batch_size: prompts per call.
        max_batch_size: not supported.
        max_new_tokens: longest answer of tasks that name none.
        ignore_gen_kwargs: unsupported generation settings of tasks to leave out, separated by `+`.
        num_frames, fps, max_frames: how videos are sampled, see `VideoSampling`.
        system_prompt: text of a system turn, or a file with it.
        model: fields of `ModelSettings`.

    Raises:
        FileNotFoundError, ValueError: a mistake in the arguments, or no such model.
    """

    served: Served | None
    task_dict: Any

    def __init__(
        self,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        max_new_tokens: int = 1024,
        ignore_gen_kwargs: str = "",
        num_frames: int | None = 8,
        fps: float | None = None,
        max_frames: int | None = None,
        system_prompt: str = "",
        **model: Any,
    ) -> None:
        super().__init__()
        known = [*MODEL_OPTIONS, "batch_size", *OPTIONS]
        unknown = sorted(set(model) - set(MODEL_OPTIONS))
        if unknown:
            raise ValueError(
                f"model_args: no argument {', '.join(unknown)};{did_you_mean(unknown[0], known)} known: "
                f"{', '.join(known)}."
            )
        if "pretrained" not in model:
            raise ValueError("model_args needs pretrained=DIR, the folder or hub id of an export or a base.")
        if max_batch_size is not None or not str(batch_size).isdigit():
            raise ValueError(f"batch_size must be a number, got {batch_size!r}; automatic sizes are not supported.")
        self.max_new_tokens = int(max_new_tokens)
        self.ignored = tuple(name for name in str(ignore_gen_kwargs).split("+") if name)
        self.system_prompt = self._resolve_system_prompt(str(system_prompt))  # type: ignore[attr-defined]
        settings = ModelSettings(**model)
        if not settings.device_map:
            settings = replace(settings, device=device_of_rank(settings.device))
        self.served = Served.load(settings)
        self.answering = Answering(self.served, int(batch_size), VideoSampling(num_frames, fps, max_frames))
        log("info", self.served.description)

    # ------------------------------------------------------------------ what lmms-eval reads

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self._served.model.parameters()).device

    @property
    def batch_size(self) -> int:
        """Prompts per call."""
        return self.answering.batch_size

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for caches of requests."""
        return str(getattr(self._served.processor.tokenizer, "name_or_path", ""))

    def clean(self) -> None:
        """Release the model: lmms-eval may load a judge next."""
        self.served = None
        del self.answering
        super().clean()  # type: ignore[misc]

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers with token counts, one per request."""
        prompts = [(self.prompt(request), self.settings_of(request)) for request in requests]
        return [generation_result(answer) for answer in self._answers(prompts)]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answers of every round, one list per request. Rounds of several requests share batches."""
        told: list[list[str]] = [[] for _ in requests]
        rounds = [self.rounds(request) for request in requests]
        waiting = [(index, next_prompt(told[index])) for index, next_prompt in enumerate(rounds)]
        while asked := [(index, prompt) for index, prompt in waiting if prompt is not None]:
            answers = self._answers([(prompt, self.settings_of(requests[index])) for index, prompt in asked])
            for (index, _), answer in zip(asked, answers, strict=True):
                told[index].append(answer.text)
            waiting = [(index, rounds[index](told[index])) for index, _ in asked]
        return told

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(value, whether the continuation is the greedy answer) of every request.

        The value of a multiple choice is the mean loss per token, the smallest of which lmms-eval takes; that of a
        target of the task is its log-likelihood.
        """
        pairs, is_choice = [], []
        for request in requests:
            if len(request.args) < 6:
                raise ValueError("Choices without their question (acc_mutual_info) are not supported; leave it out.")
            context, target, to_visual, index, task, split = request.args
            doc = self.doc(task, split, index)
            prompt = self._prompt(f"{task} {index}", task, self.turns(context, to_visual(doc)))
            pairs.append((prompt, target if isinstance(target, str) else str(target(doc))))
            is_choice.append(isinstance(target, str))
        tally, found = Tally(), list[tuple[float, bool]]()
        for batch in self.answering.score(pairs):
            for scored in batch:
                tally.add(pairs[len(found)][0].group, scored)
                value = scored.log_likelihood
                found.append((-value / scored.tokens if is_choice[len(found)] else value, scored.greedy))
        self._report(tally)
        return found

    # ------------------------------------------------------------------ what subclasses implement

    def prompt(self, request: Any) -> Prompt:
        """The prompt of a request."""
        raise NotImplementedError(f"{type(self).__name__} must implement prompt(request).")

    def settings_of(self, request: Any) -> GenerationSettings:
        """Generation settings of a request."""
        raise NotImplementedError(f"{type(self).__name__} must implement settings_of(request).")

    def rounds(self, request: Any) -> Callable[[list[str]], Prompt | None]:
        """A function from the answers so far to the prompt of the next round; None ends."""
        raise NotImplementedError(f"{type(self).__name__} must implement rounds(request).")

    # ------------------------------------------------------------------ shared

    def turns(self, context: str, visuals: Any) -> list[Turn]:
        """The turn of a text and its media."""
        return [Turn("user", interleaved(context, *sorted_media(visuals)))]

    def doc(self, task: str, split: str, index: int) -> Any:
        """A document of a task."""
        return self.task_dict[task][split][index]

    def read_settings(self, values: Any) -> GenerationSettings:
        """Generation settings from those of a task."""
        return GenerationSettings.of(values, max_new_tokens=self.max_new_tokens, ignore=self.ignored)

    def _prompt(self, name: str, task: str, turns: Sequence[Turn]) -> Prompt:
        given = list(turns)
        if self.system_prompt:
            given = [Turn("system", [Part("text", self.system_prompt)])] + [t for t in given if t.role != "system"]
        return Prompt(name, given, task)

    @property
    def _served(self) -> Served:
        if self.served is None:
            raise ValueError("The model was released (lmms-eval has called clean()); create it again.")
        return self.served

    def _answers(self, prompts: Sequence[tuple[Prompt, GenerationSettings]]) -> list[Answer]:
        """Answers in the order of the prompts; those of equal settings share batches."""
        groups: dict[GenerationSettings, list[int]] = defaultdict(list)
        for index, (_, settings) in enumerate(prompts):
            groups[settings].append(index)
        found: dict[int, Answer] = {}
        tally, start = Tally(), time.perf_counter()
        for settings, indices in groups.items():
            left = iter(indices)
            for batch in self.answering.generate([prompts[index][0] for index in indices], settings):
                for answer, index in zip(batch, left, strict=False):
                    found[index] = answer
                    tally.add(prompts[index][0].group, answer)
                if len(found) % 100 < len(batch):
                    log("info", f"{len(found)} of {len(prompts)} prompts answered")
        self._report(tally, sum(answer.output_tokens for answer in found.values()), time.perf_counter() - start)
        return [found[index] for index in range(len(prompts))]

    def _report(self, tally: Tally, tokens: int = 0, seconds: float = 0.0) -> None:
        """Log the counts, record their means in the results, and name tasks that a plan leaves as they are."""
        for line in tally.lines():
            log("info", line)
        plan = self._served.plan
        for task in tally.unpruned() if plan is not None else ():
            assert plan is not None
            log("warning", f"The plan {plan_text(plan)} prunes nothing on {task}: every vision token is retained.")
        log_means(tally, tokens, seconds)
