"""Logits of answers only: inside an `answers` block the output head runs on the positions that predict a label.

with answers(model) as found:
    model(**inputs, labels=labels).loss.backward()
found.logits_AC, found.hidden_AD, found.targets_A, found.sample_A

A prompt with images has thousands of positions and the head a vocabulary of hundred thousands; a loss reads only the
few positions that predict the answer. What the model does to logits after its head, it does to these rows. The block
holds in the thread or asyncio task that opens it.

B samples, N columns of the sequence at hand, A answer tokens, D hidden size, C vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpcompress.insertion.attach import attachment_of, base_of, is_attached
from tpcompress.insertion.context import PerContext
from tpcompress.insertion.signatures import unbound_signature


@dataclass
class Answers:
    """What the last call inside an `answers` block left; all None before it.

    Attributes:
        hidden_AD: input of the head at the positions that predict answer tokens, sample by sample, in order.
        logits_AC: the model's logits there.
        targets_A: the answer tokens.
        sample_A: int64, the sample of each answer token.
    """

    hidden_AD: Tensor | None = None
    logits_AC: Tensor | None = None
    targets_A: Tensor | None = None
    sample_A: Tensor | None = None


@dataclass
class _Block:
    """One open block: labels for calls without any, the number of answers if known, and what the last call left."""

    found: Answers
    given: Tensor | None
    num_answers: int | None
    labels: Tensor | None = None


@dataclass
class _Installed:
    """Stand-ins of one model, shared by the blocks of all contexts."""

    handle: RemovableHandle
    before: dict[str, Any]
    users: int = 0


_blocks: PerContext[_Block] = PerContext("tpcompress_answers")
_installed: WeakKeyDictionary[nn.Module, _Installed] = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def answers(model: nn.Module, labels: Tensor | None = None, num_answers: int | None = None) -> Iterator[Answers]:
    """Run the output head only where a label is predicted: position i for the label at i + 1, after all stages.

    The model's own loss keeps its value; the logits of its output are (1, A, C).

    Args:
        model: a transformers model or a PEFT model around one, with a plan or without.
        labels: (B, S), -100 where nothing is to be predicted; for calls that come without labels.
        num_answers: A, if known: the labels that are not -100, without the first column. Counting them costs a
            host-device sync. A larger number is filled up with positions that have no label; a smaller one leaves the
            last answers out.

    Yields:
        What the last call left.

    Raises:
        ValueError: a call without labels, or with logits_to_keep.
    """
    base: Any = base_of(model)
    block, outer = _Block(Answers(), labels, num_answers), _blocks.get(base)
    _install(base)
    try:
        _blocks.set(base, block)
        yield block.found
    finally:
        _blocks.set(base, outer)
        _uninstall(base)


def answer_places(labels_BN: Tensor, count: int | None = None) -> Tensor:
    """Places (A,), in a grid of B x N, of the positions that predict an answer token: i predicts label i + 1.

    Args:
        labels_BN: -100 except on answers; the first column is not predicted.
        count: A, if known on the host; otherwise counting costs a host-device sync.
    """
    wanted_M = (_next(labels_BN) != -100).flatten()
    count = int(wanted_M.sum()) if count is None else count
    # A stable sort instead of a mask as index: the count is known, so nothing has to be counted on the device.
    return (~wanted_M).to(torch.int8).argsort(stable=True)[:count]


def _next(labels_BN: Tensor) -> Tensor:
    """Label that each position predicts, (B, N); -100 for the last one."""
    return torch.nn.functional.pad(labels_BN[:, 1:], (0, 1), value=-100)


def _install(base: Any) -> None:
    with _lock:
        if base not in _installed:
            before = {name: base.__dict__.get(name) for name in ("forward", "_loss_function")}
            loss = _AnswersLoss(base, base.loss_function)
            forward = _AnswersForward(base)
            handle = base.get_output_embeddings().register_forward_pre_hook(forward.select)
            base.__dict__["forward"], base.__dict__["_loss_function"] = forward, loss
            _installed[base] = _Installed(handle, before)
        _installed[base].users += 1


def _uninstall(base: Any) -> None:
    with _lock:
        installed = _installed[base]
        installed.users -= 1
        if installed.users:
            return
        del _installed[base]
        installed.handle.remove()
        for name, value in installed.before.items():
            del base.__dict__[name]
            if value is not None:
                base.__dict__[name] = value


class _AnswersForward:
    """Replaces `model.forward`: takes the labels before the head runs, and the logits after it. Same signature."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.previous = model.__dict__.get("forward")
        self.__signature__ = unbound_signature(type(model).forward)

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = _blocks.get(self.model)
        if block is None:
            return self._plain(*args, **kwargs)
        arguments = self.__signature__.bind_partial(*args, **kwargs).arguments
        block.labels = arguments.get("labels")
        if block.labels is None:
            block.labels = kwargs["labels"] = block.given
        if block.labels is None:
            raise ValueError("Answers cannot be found without labels; pass labels to the call or to `answers`.")
        try:
            output = self._plain(*args, **kwargs)
        finally:
            block.labels = None
        block.found.logits_AC = (output["logits"] if isinstance(output, dict) else output[1])[0]
        return output

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    @torch.compiler.disable
    def select(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hook of the head: of its input (B, N, D) the rows that predict answers, as (1, A, D)."""
        block = _blocks.get(self.model)
        if block is None or block.labels is None:
            return None
        hidden_BND, *rest = args
        labels_BN = self._shortened(block.labels)
        B, N, D = hidden_BND.shape
        if labels_BN.shape != (B, N):
            raise ValueError(
                f"The head got {N} columns for labels of {labels_BN.shape[1]}; leave logits_to_keep out in an "
                f"`answers` block."
            )
        place_A = answer_places(labels_BN, block.num_answers)
        hidden_AD = hidden_BND.reshape(-1, D).index_select(0, place_A.to(hidden_BND.device))
        block.found.hidden_AD, block.found.targets_A = hidden_AD, _next(labels_BN).flatten()[place_A]
        block.found.sample_A = place_A // N
        return hidden_AD[None], *rest

    def _shortened(self, labels: Tensor) -> Tensor:
        """The call's labels, shortened like the sequence."""
        call = attachment_of(self.model).call if is_attached(self.model) else None
        if call is None or call.frame is None or labels.shape[1] != call.frame.length:
            return labels
        return call.frame.labels(labels)


class _AnswersLoss:
    """Replaces `model.loss_function`: the model's own, with the label that each row predicts."""

    def __init__(self, model: Any, base: Any) -> None:
        self.model, self.base = model, base

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        block = _blocks.get(self.model)
        if block is not None:
            assert block.found.targets_A is not None
            kwargs = kwargs | {"shift_labels": block.found.targets_A[None]}
        loss: Tensor = self.base(logits, labels, *args, **kwargs)
        return loss
