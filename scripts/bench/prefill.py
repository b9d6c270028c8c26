"""Measure the cost of a prefill with a stage against the same decoder on a natively short sequence.

Only the language part is timed: embedding, merging, positions, decoder layers, the head on the last column, and the
stage. Images are encoded once beforehand by the attached model and passed as `mm_encoder_outputs`.
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
from tpcompress.evaluation.scoring.stats import median_interval
from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage

Run = Callable[[], Any]
LIMIT = 1.05
"""Maximum ratio of the pruned to the ideal prefill, apart from noise."""


@dataclass(frozen=True)
class Case:
    """One stage of one model, as three prefills to compare.

    Attributes:
        model, layer, keep: name of the model, layer and retained tokens of the stage.
        full, pruned, ideal: the prefills; each returns the model output.
    """

    model: str
    layer: int
    keep: int
    full: Run
    pruned: Run
    ideal: Run


@dataclass(frozen=True)
class Seconds:
    """Time of one run: wall clock, and processor time of all threads of the process."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Ratio:
    """Ratio of two runs: median over pairs of neighbouring rounds, with a 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Summarise paired times."""
        ratios = np.asarray(above) / np.asarray(below)
        return cls(float(np.median(ratios)), *median_interval(ratios))

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
    """Create the cases of one model, which share its weights and its encoded image.

    Args:
        name: key of `MODELS`.
        shape: sizes of model and prompt.
        pruner: name or config of the pruner.
        layers: layers of the stage.
        keeps: retained vision tokens.
        device, dtype, attention: settings of the model.
        positions: position policy of the plan.

    Raises:
        ValueError: unknown model, or a budget that drops nothing.
    """
    if name not in MODELS:
        raise ValueError(f"No model '{name}' in this benchmark; choose one of {', '.join(MODELS)}.")
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
    # The ideal gets the tokens that the pruner selected, so that both compute the same.
    retained_V = trace.stages[0].retained_RV[0]
    full = partial(base, **inputs)
    if layer:
        ideal = partial(short_from_layer, base, inputs, layer, _columns(inputs["input_ids"][0], retained_V))
    else:
        encoded = inputs["mm_encoder_outputs"]["image"]
        ideal = partial(base, **shortened(base, shape, encoded, retained_V.nonzero()[:, 0]))
    return Case(name, layer, keep, full, partial(pruned, **inputs), ideal)


def _columns(ids_S: Tensor, retained_V: Tensor) -> Tensor:
    """Columns of text and retained vision tokens."""
    stays_S = ids_S != IMAGE
    stays_S[~stays_S] = retained_V
    return stays_S.nonzero()[:, 0]


# ------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Measured:
    """Measurements of one case.

    Attributes:
        case: the case.
        seconds: median times of full, ideal and pruned.
        ratio: pruned / ideal.
        control: ideal / ideal, timed twice: the noise.
        flops: FLOPs of full, ideal and pruned.
        peak: peak memory of full, ideal and pruned in bytes.
    """

    case: Case
    seconds: tuple[float, float, float]
    ratio: Ratio
    control: Ratio
    flops: tuple[int, int, int]
    peak: tuple[int, int, int]

    @property
    def ok(self) -> bool:
        """The ratio is not significantly above `LIMIT`."""
        return self.ratio.low <= LIMIT


def measure(case: Case, repeats: int, clock: str, device: str) -> Measured:
    """Measure time, FLOPs and peak memory of the prefills of one case.

    Args:
        case: case to measure.
        repeats: rounds of full, ideal, pruned and again ideal.
        clock: `cpu` for processor time, which other processes hardly affect; `wall` for a GPU.
        device: device of the model.
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
    """Time several runs in turns, so that the load of the machine affects all of them.

    Args:
        runs: runs to time; their order is reversed in every other round.
        repeats: rounds.
        warm_up: additional rounds before, which are not recorded.

    Returns:
        one list per run with one entry per round.
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
            gc.collect(0)  # outside of the timed runs
    finally:
        if collecting:
            gc.enable()
    return taken


@torch.no_grad()
def timed(run: Run) -> Seconds:
    """Time one run, with a device sync before and after."""
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    _wait()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


@torch.no_grad()
def flops(run: Run) -> int:
    """FLOPs of the matrix products, with 2 per multiply-add.

    Attention is counted in full, including masked entries that a kernel may skip, and run as plain matrix products,
    because the counter does not support every fused kernel.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return int(counter.get_total_flops())


@torch.no_grad()
def peak_bytes(run: Run, device: str) -> int:
    """Peak memory of a run in bytes, without what was allocated before: activations, logits and KV cache.

    On a GPU from the allocator. On a CPU from the live tensors between operations, without temporary buffers inside
    kernels.
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
    """Tracks the storages that operations allocate; `peak` is the maximum of live bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count its results, except views and in-place results."""
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
