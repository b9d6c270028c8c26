"""Runs one forward call and collects logits, hidden states and stage traces at the answer tokens.

B samples, S columns of the batch, N columns after the last stage, A answer tokens of the whole batch, C vocabulary,
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
from tpcompress.insertion.attach import attachment_of, base_of, budgets, is_attached, record
from tpcompress.insertion.plan import Budget
from tpcompress.insertion.trace import Trace


@dataclass
class Pass:
    """Results of one forward call. The A answer tokens are ordered by sample, then by position.

    Attributes:
        logits_AC: logits that predict the answer tokens, at the position before each.
        hidden_AD: input of the output head at these positions; None from a cache.
        targets_A: ids of the answer tokens.
        sample_A: int64, sample of each answer token.
        num_samples: B.
        trace: trace of the stages; None without a plan.
        budgets: budgets of the stages in this call. At full length the counts in the trace do not fall.
        labels_BS: labels of the batch before any stage; None from a cache.
        own_AC: logits at the answer tokens themselves, which predict the tokens after them; None unless requested.
        top_indices_AT: vocabulary ids of the T columns of `logits_AC` from a cache, which are then log probabilities;
            None otherwise.
        tail_A: log probability of all other tokens together, if `top_indices_AT` is given.
        per_sample: losses are means over samples, each by the mean of its answer tokens, not over answer tokens.
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
    per_sample: bool = False

    def answer_mean(self, value_A: Tensor) -> Tensor:
        """Mean of a value of each answer token: over the tokens, or over the samples that have any."""
        if not self.per_sample:
            return value_A.mean()
        zero_B = value_A.new_zeros(self.num_samples)
        count_B = self._answers_of_samples().to(value_A.dtype)
        return (zero_B.index_add(0, self.sample_A, value_A) / count_B.clamp(min=1)).sum() / self.num_answered()

    def num_answered(self) -> Tensor:
        """Number of samples with answer tokens, at least 1, on the device."""
        return (self._answers_of_samples() > 0).sum().clamp(min=1)

    def _answers_of_samples(self) -> Tensor:
        """Number of answer tokens of each sample (B,)."""
        ones_A = self.sample_A.new_ones(len(self.sample_A))
        return self.sample_A.new_zeros(self.num_samples).index_add(0, self.sample_A, ones_A)


def run_pass(
    model: nn.Module, batch: Mapping[str, Any], values: Sequence[Budget] | None = None, own: bool = False
) -> Pass:
    """Call the model on a batch and collect the results at its answer tokens.

    Args:
        model: model with or without a plan; mode, training flags and autograd are set by the caller.
        batch: output of the collator, with `labels`, and possibly `meta`.
        values: budgets of this call; None for the current ones.
        own: also collect the logits at the answer tokens themselves, which computes the logits of the whole sequence.

    Raises:
        ValueError: the batch has no labels.
    """
    if batch.get("labels") is None:
        raise ValueError("A batch without labels has no answers to train on; use a collator that makes labels.")
    inputs = {name: value for name, value in batch.items() if name != "meta"}
    call = functools.partial(model, **inputs, use_cache=False)
    trace, used = None, []
    with ExitStack() as stack:
        if is_attached(model):
            if values is not None:
                stack.enter_context(budgets(model, values))
            used = list(attachment_of(model).settings.budgets)
            trace = stack.enter_context(record(model))
        run = _all_positions if own else _answers_only
        result = run(model, call, inputs["labels"], count_answers(batch), trace)
    result.trace, result.budgets = trace, used
    return result


def count_answers(batch: Mapping[str, Any]) -> int | None:
    """Number of answer tokens of a batch, if its collator counted them (spares a host-device sync)."""
    known: int | None = getattr(batch.get("meta"), "num_answers", None)
    return known


def _answers_only(
    model: nn.Module, call: Callable[[], Any], labels_BS: Tensor, count: int | None, trace: Trace | None
) -> Pass:
    """Run the output head only at the positions that predict an answer token."""
    with answers(model, num_answers=count) as found:
        call()
    assert found.logits_AC is not None and found.targets_A is not None and found.sample_A is not None
    B = len(labels_BS)
    return Pass(found.logits_AC, found.hidden_AD, found.targets_A, found.sample_A, B, labels_BS=labels_BS)


def _all_positions(
    model: nn.Module, call: Callable[[], Any], labels_BS: Tensor, count: int | None, trace: Trace | None
) -> Pass:
    """Run the output head at every position."""
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
    """Records the input of the output head while a block runs."""

    def __init__(self, model: nn.Module) -> None:
        self.head: Any = base_of(model).get_output_embeddings()
        self.hidden_BND: Tensor

    def __enter__(self) -> _HeadInput:
        self.handle = self.head.register_forward_pre_hook(self._record)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def _record(self, module: nn.Module, args: tuple) -> None:
        self.hidden_BND = args[0]
