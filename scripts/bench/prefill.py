"""What a prefill costs with a stage, against the same decoder fed natively with the short sequence.

Only the language part is timed: embedding, merging, positions, decoder layers, the head's last column and the stage
itself. Images are encoded once beforehand, by the attached model, and given as `mm_encoder_outputs`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from bench.models import (
    IMAGE,
    MODELS,
    Shape,
    features,
    prompt,
    sharing_copy,
    short_from_layer,
    shortened,
)
from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage

Run = Callable[[], Any]
RESAMPLES = 2000
LIMIT = 1.05
"""A stage may cost this much more than its ideal, beyond noise."""


@dataclass(frozen=True)
class Case:
    """One stage on one model: three prefills to compare.

    Attributes:
        model, layer, keep: which.
        full, pruned, ideal: the prefills; each returns what the model returned.
    """

    model: str
    layer: int
    keep: int
    full: Run
    pruned: Run
    ideal: Run


@dataclass(frozen=True)
class Seconds:
    """Time of one prefill: wall clock, and what all threads of the process computed (on a GPU: of the host)."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """How much longer one prefill takes than another: median of neighbouring pairs, 95 % interval by bootstrap."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """From times that were taken in pairs."""
        ratios = np.asarray(above) / np.asarray(below)
        drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
        return cls(float(np.median(ratios)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def make_cases(
    name: str,
    shape: Shape,
    pruner: Any,
    layers: Sequence[int],
    keeps: Sequence[int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    positions: str = "original",
) -> list[Case]:
    """The cases of one model; they share its weights and its encoded picture.

    Args:
        name: a key of `MODELS`.
        shape: sizes.
        pruner: name or config; one that judges by hidden states alone costs no matrix product.
        layers: where the stage acts.
        keeps: how many vision tokens it keeps.
        device, dtype, attention: of the model.
        positions: policy of the plan.

    Raises:
        ValueError: unknown model, or a budget that leaves nothing to drop.
    """
    if name not in MODELS:
        raise ValueError(f"No model '{name}' for this benchmark; known: {', '.join(MODELS)}.")
    if max(keeps) >= shape.side**2:
        raise ValueError(f"keep {max(keeps)} of {shape.side**2} vision tokens drops nothing; choose fewer.")
    torch.manual_seed(0)
    base: Any = MODELS[name](shape, attention)
    base.to(device, dtype)
    cases = []
    for layer in layers:
        for keep in keeps:
            pruned = attach(sharing_copy(base), PruningPlan([Stage(pruner, layer, keep_tokens=keep)], positions)).eval()
            cases.append(_case(name, base, pruned, shape, layer, keep))
    return cases


def _case(name: str, base: Any, pruned: Any, shape: Shape, layer: int, keep: int) -> Case:
    with torch.no_grad(), record(pruned) as trace:
        inputs = prompt(pruned, shape, shape.side, shape.side, features(pruned, shape))
        pruned(**inputs)
    # The ideal gets the very tokens that the pruner chose, so that both compute the same.
    retained_V = trace.stages[0].retained_RV[0]
    full = partial(base, **inputs)
    if layer:
        ideal = partial(short_from_layer, base, inputs, layer, _columns(inputs["input_ids"][0], retained_V))
    else:
        encoded = inputs["mm_encoder_outputs"]["image"]
        ideal = partial(base, **shortened(base, shape, encoded, retained_V.nonzero()[:, 0]))
    return Case(name, layer, keep, full, partial(pruned, **inputs), ideal)


def _columns(ids_S: Tensor, retained_V: Tensor) -> Tensor:
    """Columns of the prompt that are words or retained vision tokens."""
    stays_S = ids_S != IMAGE
    stays_S[~stays_S] = retained_V
    return stays_S.nonzero()[:, 0]


# ------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Measured:
    """One case, measured.

    Attributes:
        case: which.
        seconds: medians of full, ideal and pruned by the clock that was asked for.
        ratio: pruned to ideal.
        control: the same ideal timed twice: what is noise.
        flops, peak: of full, ideal and pruned; bytes.
    """

    case: Case
    seconds: tuple[float, float, float]
    ratio: Ratio
    control: Ratio
    flops: tuple[int, int, int]
    peak: tuple[int, int, int]

    @property
    def ok(self) -> bool:
        """The ratio is within `LIMIT`, or noise cannot tell."""
        return self.ratio.low <= LIMIT


def measure(case: Case, repeats: int, clock: str, device: str) -> Measured:
    """Time, count and weigh the prefills of one case.

    Args:
        case: what to measure.
        repeats: rounds of full, ideal, pruned and the ideal again.
        clock: `cpu` for the time that the process computes, which busy neighbours hardly touch; `wall` for a GPU.
        device: where the model is.
    """
    runs = (case.full, case.ideal, case.pruned)
    full, ideal, pruned, again = (
        [getattr(seconds, clock) for seconds in taken] for taken in interleaved((*runs, case.ideal), repeats)
    )
    return Measured(
        case,
        (float(np.median(full)), float(np.median(ideal)), float(np.median(pruned))),
        Ratio.of(pruned, ideal),
        Ratio.of(again, ideal),
        (flops(case.full), flops(case.ideal), flops(case.pruned)),
        (peak_bytes(case.full, device), peak_bytes(case.ideal, device), peak_bytes(case.pruned, device)),
    )


def interleaved(runs: Sequence[Run], repeats: int, warm_up: int = 2) -> list[list[Seconds]]:
    """Time several prefills in turns, so that whatever else the machine does meets all of them.

    Args:
        runs: what to time; every other round goes through them backwards.
        repeats: rounds.
        warm_up: rounds before them that do not count.

    Returns:
        For each of `runs`, one entry per round.
    """
    taken: list[list[Seconds]] = [[] for _ in runs]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(warm_up + repeats):
            order = range(len(runs)) if round_ % 2 else reversed(range(len(runs)))
            for index in order:
                seconds = timed(runs[index])
                if round_ >= warm_up:
                    taken[index].append(seconds)
            gc.collect(0)  # what would else run inside a later round
    finally:
        if collecting:
            gc.enable()
    return taken


@torch.no_grad()
def timed(run: Run) -> Seconds:
    """Run once and wait for the device."""
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    _wait()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


@torch.no_grad()
def flops(run: Run) -> int:
    """Floating-point operations of the matrix products, a multiply-add counted as 2.

    Attention is counted in full, also where a kernel would skip what is masked, and in plain matrix products, because
    the counter does not know every fused kernel.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


@torch.no_grad()
def peak_bytes(run: Run, device: str) -> int:
    """Most memory at one time beyond what is there before: activations, logits and the KV cache, not the weights.

    On a GPU as its allocator counts. On a CPU, whose allocator does not: the tensors alive between two operations;
    what a kernel takes and gives back inside itself is not seen.
    """
    if torch.device(device).type == "cuda":
        gc.collect()
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    with LiveTensors() as live:
        run()
    return live.peak


class LiveTensors(TorchDispatchMode):
    """Follows the storages that operations make, and the most bytes that were alive at one time (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count its results, unless they are views or in place."""
        kwargs = kwargs or {}
        given = {_storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and (storage := _storage(made))._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _storage(x: Tensor) -> Any:
    return x.untyped_storage()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
