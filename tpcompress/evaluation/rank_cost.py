"""Cost of a prefill with each rule, relative to the dense model: measured time in one interleaved run, and FLOPs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tpcompress.data.collate import PromptCollator
from tpcompress.data.rows import BadRow
from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.engine.cell import Cell, Made
from tpcompress.evaluation.engine.fingerprint import code_digest
from tpcompress.evaluation.scoring.stats import median_interval
from tpcompress.inference import inference, inputs_for
from tpcompress.insertion.attach import attach, detach, record
from tpcompress.insertion.cost import decoder_flops, has_formula
from tpcompress.insertion.plan import PruningPlan

PROMPTS = 3
ROUNDS = 3


@dataclass(frozen=True)
class Cost:
    """Cost of a prefill relative to the dense model's on the same prompts.

    Attributes:
        time: time of the whole prefill (vision tower, selection, language model): median over prompts and rounds of
            pruned / dense.
        time_low, time_high: its 95 % bootstrap interval.
        flops: FLOPs of the decoder layers by formula, without the selection; None where the formula does not hold.
    """

    time: float
    time_low: float
    time_high: float
    flops: float | None


@dataclass(frozen=True, eq=False)
class CostCell(Cell):
    """The costs of all rules at all budgets, timed in turns. Its record holds `costs` by name of the rule's cell.

    Attributes:
        plans: plans by name of the cell.
    """

    plans: Mapping[str, PruningPlan]

    def key(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Shared settings and every plan with its code."""
        plans = {name: [plan.to_dict(), code_digest(plan)] for name, plan in self.plans.items()}
        return {**common, "plans": plans, "prompts": PROMPTS, "rounds": ROUNDS}

    def make(self, bench: Bench) -> Made:
        """Time every plan."""
        prompts = prompts_of(bench.processor, bench.task.rows, PROMPTS)
        costs = measure(bench.model, prompts, self.plans, ROUNDS)
        summary = f"time and FLOPs of a prefill on {len(prompts)} prompts"
        device = str(next(bench.model.parameters()).device)
        return Made({"costs": {name: asdict(cost) for name, cost in costs.items()}, "summary": summary, "on": device})


def prompts_of(processor: Any, rows: Any, number: int) -> list[dict[str, Any]]:
    """Model inputs of the first question of the first rows with images.

    Raises:
        ValueError: no row has a readable image.
    """
    collator, found = PromptCollator(processor), []
    for index in range(len(rows)):
        row = dict(rows[index])
        if not row["images"] and not row.get("videos"):
            continue
        try:
            batch = collator([row | {name: row[name][:1] for name in ("conversations", "families")}])
        except BadRow:
            continue
        found.append({name: value for name, value in batch.items() if name != "meta"})
        if len(found) == number:
            break
    if not found:
        raise ValueError(f"None of the {len(rows)} rows has a readable image; rank needs rows with images.")
    return found


def measure(
    model: nn.Module, prompts: Sequence[Mapping[str, Any]], plans: Mapping[str, PruningPlan], rounds: int
) -> dict[str, Cost]:
    """Prefill every prompt with the dense model and with every plan in turns, so that all meet the same machine.

    Args:
        model: dense model.
        prompts: model inputs of single prompts.
        plans: plans by name; those that refuse a prompt are left out of the result.
        rounds: repetitions, after one that is not counted.
    """
    moved = [inputs_for(model, prompt) for prompt in prompts]
    ratios: dict[str, list[float]] = {name: [] for name in plans}
    shares: dict[str, list[float | None]] = {name: [] for name in plans}
    failed: set[str] = set()
    for turn in range(rounds + 1):
        for inputs in moved:
            dense = _seconds(model, inputs)
            for name, plan in plans.items():
                if name in failed:
                    continue
                try:
                    with attached(model, plan):
                        if turn == 0:
                            shares[name].append(_flops(model, inputs))
                        else:
                            ratios[name].append(_seconds(model, inputs) / dense)
                except ValueError:  # its own cell says why
                    failed.add(name)
    return {name: _cost(ratios[name], shares[name]) for name in plans if name not in failed}


@contextmanager
def attached(model: nn.Module, plan: PruningPlan) -> Iterator[None]:
    """Run a block with a plan on a dense model."""
    attach(model, plan)
    try:
        yield
    finally:
        detach(model)


def _seconds(model: Any, inputs: Mapping[str, Any]) -> float:
    """Seconds of one prefill as `generate` makes it: with a cache, and logits of the last position only."""
    cuda = next(model.parameters()).is_cuda
    with inference(model):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(**inputs, use_cache=True, logits_to_keep=1)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _flops(model: Any, inputs: Mapping[str, Any]) -> float | None:
    """FLOPs of the decoder layers for one prompt, relative to dense; None where the formula does not hold."""
    if not has_formula(model.config):
        return None
    with inference(model), record(model) as trace:
        model(**inputs, use_cache=True, logits_to_keep=1)
    if not trace.stages:
        return 1.0
    depth = model.config.get_text_config().num_hidden_layers
    full = [trace.stages[0].sequence_in] * depth
    lengths = list(full)
    for stage in trace.stages:
        lengths[stage.layer :] = [stage.sequence_out] * (depth - stage.layer)
    return decoder_flops(model.config, lengths) / decoder_flops(model.config, full)


def _cost(ratios: Sequence[float], shares: Sequence[float | None]) -> Cost:
    values, known = np.array(ratios), [share for share in shares if share is not None]
    median, (low, high) = float(np.median(values)), median_interval(values)
    flops = float(np.mean(known)) if len(known) == len(shares) else None
    return Cost(round(median, 4), round(low, 4), round(high, 4), flops)
