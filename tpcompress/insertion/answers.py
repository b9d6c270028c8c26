"""Logits of answers only: while `answers` is open, the output head runs on the positions that predict a label.

with answers(model) as found:
    model(**inputs, labels=labels).loss.backward()
found.logits_AC, found.hidden_AD, found.targets_A, found.sample_A

A prompt of vision tokens and words has thousands of positions and the head a vocabulary of hundred thousands; a loss
reads the few rows that predict the answer. What the model does to logits behind its head, it does to these rows.

B samples, N columns of the sequence at hand, A answer tokens, D hidden size, C vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpcompress.insertion.attach import CONTROLLER, base_of
from tpcompress.insertion.encode import unbound_signature


@dataclass
class Answers:
    """What the last call inside an `answers` block left; None before it.

    Attributes:
        hidden_AD: input of the head at the positions that predict answer tokens, sample by sample, in order.
        logits_AC: the model's logits there.
        targets_A: the answer tokens.
        sample_A: int64, the sample of each.
    """

    hidden_AD: Tensor | None = None
    logits_AC: Tensor | None = None
    targets_A: Tensor | None = None
    sample_A: Tensor | None = None


@contextmanager
def answers(model: nn.Module, labels: Tensor | None = None, num_answers: int | None = None) -> Iterator[Answers]:
    """Run the output head only where a label is predicted: position i for the label at i + 1, behind all stages.

    The model's own loss has the same value as without; its output holds the logits (1, A, C).

    Args:
        model: a transformers model or a PEFT model around one, with a plan or without.
        labels: (B, S), -100 where nothing is to be predicted; for calls that come without any.
        num_answers: A, if the caller knows it: the labels that are not -100, without the first column. Counting them
            makes the host wait for the device. Further positions are filled up with ones that have no label; a number
            that is too small leaves the last answers out.

    Yields:
        What the last call left.

    Raises:
        ValueError: a call without labels, or with logits_to_keep.
    """
    base: Any = base_of(model)
    found = Answers()
    tap = _Tap(base, labels, num_answers, found)
    before = {name: base.__dict__.get(name) for name in ("forward", "_loss_function")}
    handle = base.get_output_embeddings().register_forward_pre_hook(tap.select)
    base.__dict__["forward"], base.__dict__["_loss_function"] = tap, _AnswerLoss(tap, base.loss_function)
    try:
        yield found
    finally:
        handle.remove()
        for name, value in before.items():
            del base.__dict__[name]
            if value is not None:
                base.__dict__[name] = value


def answer_places(labels_BN: Tensor, count: int | None = None) -> Tensor:
    """Places (A,), in a grid of B x N, of the positions that predict an answer token: i predicts label i + 1.

    Args:
        labels_BN: -100 but on answers; the first column is not predicted.
        count: A, if the host knows it; otherwise it looks.
    """
    wanted_M = (_next(labels_BN) != -100).flatten()
    count = int(wanted_M.sum()) if count is None else count
    # A stable sort instead of a mask as index: the count is known, so nobody waits.
    return (~wanted_M).to(torch.int8).argsort(stable=True)[:count]


def _next(labels_BN: Tensor) -> Tensor:
    """What each position predicts, (B, N); the last one nothing."""
    return torch.nn.functional.pad(labels_BN[:, 1:], (0, 1), value=-100)


class _Tap:
    """Stands in for `model.forward`: knows the labels before the head runs, and takes the logits. Same signature."""

    def __init__(self, model: Any, labels: Tensor | None, num_answers: int | None, found: Answers) -> None:
        self.model, self.given, self.num_answers, self.found = model, labels, num_answers, found
        self.previous = model.__dict__.get("forward")
        self.labels: Tensor | None = None
        self.__signature__ = unbound_signature(type(model).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.__signature__.bind_partial(*args, **kwargs).arguments
        self.labels = arguments.get("labels")
        if self.labels is None:
            self.labels = kwargs["labels"] = self.given
        if self.labels is None:
            raise ValueError("There are no answers to find without labels; pass labels to the call or to `answers`.")
        try:
            if self.previous is not None:
                output = self.previous(*args, **kwargs)
            else:
                output = type(self.model).forward(self.model, *args, **kwargs)
        finally:
            self.labels = None
        self.found.logits_AC = (output["logits"] if isinstance(output, dict) else output[1])[0]
        return output

    @torch.compiler.disable
    def select(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hook of the head: of its input (B, N, D) the rows that predict answers, as (1, A, D)."""
        hidden_BND, *rest = args
        labels_BN = self._shortened()
        B, N, D = hidden_BND.shape
        if labels_BN.shape != (B, N):
            raise ValueError(
                f"The head got {N} columns for labels of {labels_BN.shape[1]}; leave logits_to_keep out in an "
                f"`answers` block."
            )
        place_A = answer_places(labels_BN, self.num_answers)
        hidden_AD = hidden_BND.reshape(-1, D).index_select(0, place_A.to(hidden_BND.device))
        self.found.hidden_AD, self.found.targets_A = hidden_AD, _next(labels_BN).flatten()[place_A]
        self.found.sample_A = place_A // N
        return hidden_AD[None], *rest

    def _shortened(self) -> Tensor:
        """The call's labels, as the stages of a plan left them."""
        controller = getattr(self.model, CONTROLLER, None)
        call = None if controller is None else controller.call
        assert self.labels is not None
        if call is None or call.frame is None or self.labels.shape[1] != call.frame.length:
            return self.labels
        labels_BN: Tensor = call.frame.labels(self.labels)
        return labels_BN


class _AnswerLoss:
    """Stands in for `model.loss_function`: the model's own, told what each row predicts."""

    def __init__(self, tap: _Tap, base: Any) -> None:
        self.tap, self.base = tap, base

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        targets_A = self.tap.found.targets_A
        assert targets_A is not None
        loss: Tensor = self.base(logits, labels, *args, **kwargs | {"shift_labels": targets_A[None]})
        return loss
