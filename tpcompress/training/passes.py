"""What one forward call of the model left behind, and how it is made; losses and teachers speak in these terms.

B samples, S columns of the batch, N columns behind the last stage, A answer tokens of the whole batch, C vocabulary,
D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tpcompress.insertion.answers import answer_places, answers
from tpcompress.insertion.attach import base_of, budgets, controller_of, is_attached, record
from tpcompress.insertion.plan import Budget
from tpcompress.insertion.trace import Trace


@dataclass
class Pass:
    """One forward call. The A answer tokens come sample by sample, in the order of the text.

    Attributes:
        logits_AC: logits that predict the answer tokens: those of the position before each.
        hidden_AD: what the output head was given there; None from a cache.
        targets_A: the answer tokens themselves.
        sample_A: int64, the sample of each.
        num_samples: B.
        trace: what the stages did; None without a plan.
        budgets: of the stages in this call; at full length the trace's counts do not fall.
        labels_BS: labels of the batch as it came, before any stage; None from a cache.
        own_AC: logits at the answer tokens themselves, which predict what follows them; only where asked for.
        top_indices_AT: None; from a cache, the vocabulary ids that the T columns of `logits_AC` stand for. These
            columns are then logarithms of probabilities.
        tail_A: log probability of all other tokens together, beside `top_indices_AT`.
    """

    logits_AC: Tensor
    hidden_AD: Tensor | None
    targets_A: Tensor
    sample_A: Tensor
    num_samples: int
    trace: Trace | None = None
    budgets: list[Budget] = field(default_factory=list)
    labels_BS: Tensor | None = None
    own_AC: Tensor | None = None
    top_indices_AT: Tensor | None = None
    tail_A: Tensor | None = None


def run_pass(
    model: nn.Module, batch: Mapping[str, Any], values: Sequence[Budget] | None = None, own: bool = False
) -> Pass:
    """Call the model on a batch and keep what its answers need.

    Args:
        model: with or without a plan; its mode, its training flags and autograd are the caller's.
        batch: what the collator made, with `labels`; `meta` may be in it.
        values: budgets of this call; None takes those that are set.
        own: also keep the logits at the answer tokens themselves; all logits of the call exist then for a moment.

    Raises:
        ValueError: the batch has no labels.
    """
    if batch.get("labels") is None:
        raise ValueError("A batch without labels has no answers to learn; use a collator that makes labels.")
    inputs = {name: value for name, value in batch.items() if name != "meta"}
    call = functools.partial(model, **inputs, use_cache=False)
    trace, used = None, []
    with ExitStack() as stack:
        if is_attached(model):
            if values is not None:
                stack.enter_context(budgets(model, values))
            used = list(controller_of(model).settings.budgets)
            trace = stack.enter_context(record(model))
        run = _whole if own else _answers_only
        here = run(model, call, inputs["labels"], count_answers(batch), trace)
    here.trace, here.budgets = trace, used
    return here


def count_answers(batch: Mapping[str, Any]) -> int | None:
    """How many answer tokens a batch has, if its collator says so."""
    known: int | None = getattr(batch.get("meta"), "num_answers", None)
    return known


def _answers_only(
    model: nn.Module, call: Callable[[], Any], labels_BS: Tensor, count: int | None, trace: Trace | None
) -> Pass:
    """The head runs on the positions that predict an answer token, and on no other."""
    with answers(model, num_answers=count) as found:
        call()
    assert found.logits_AC is not None and found.targets_A is not None and found.sample_A is not None
    B = len(labels_BS)
    return Pass(found.logits_AC, found.hidden_AD, found.targets_A, found.sample_A, B, labels_BS=labels_BS)


def _whole(
    model: nn.Module, call: Callable[[], Any], labels_BS: Tensor, count: int | None, trace: Trace | None
) -> Pass:
    """The head runs everywhere, for a loss that reads more positions."""
    with _HeadInput(model) as heads:
        logits_BNC = call().logits
    labels_BN = labels_BS if trace is None or trace.labels_BN is None else trace.labels_BN
    B, N = labels_BN.shape
    before_A = answer_places(labels_BN, count)
    logits_MC = logits_BNC.flatten(0, 1)
    return Pass(
        logits_AC=logits_MC.index_select(0, before_A),
        hidden_AD=heads.hidden_BND.flatten(0, 1).index_select(0, before_A),
        targets_A=labels_BN.flatten().index_select(0, before_A + 1),
        sample_A=before_A // N,
        num_samples=B,
        labels_BS=labels_BS,
        own_AC=logits_MC.index_select(0, before_A + 1),
    )


class _HeadInput:
    """Holds what the output head was given while a block runs."""

    def __init__(self, model: nn.Module) -> None:
        self.head: Any = base_of(model).get_output_embeddings()
        self.hidden_BND: Tensor

    def __enter__(self) -> _HeadInput:
        self.handle = self.head.register_forward_pre_hook(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def _note(self, module: nn.Module, args: tuple) -> None:
        self.hidden_BND = args[0]
