"""Measure the time of every pruner relative to the prefill of one decoder layer of a 7B Llama.

Only `pruner(view, num_keep_B)` is timed, on random views. The cost of building the views in a model (recomputed
attention rows, keys, vision-tower views) is not included.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from bench.prefill import timed
from bench.views import Cell, Sizes, Views
from tpcompress.errors import first_line
from tpcompress.pruners import Pruner, Selection, TokenView, create

Run = Callable[[], Any]


@dataclass
class Row:
    """Measurements of one pruner for one input size.

    Attributes:
        pruner, tokens, batch, keep: pruner name, vision tokens, samples and retained tokens.
        seconds: time of each round: processor time on a CPU, between two events on a GPU.
        layer: time of one decoder layer in the same rounds.
        error: why the pruner failed.
        note: why the pruner was not timed.
        graph: whether a CUDA graph can capture it: "yes", "no: reason", or "" if not tested.
    """

    pruner: str
    tokens: int
    batch: int
    keep: int
    seconds: list[float] = field(default_factory=list)
    layer: list[float] = field(default_factory=list)
    error: str = ""
    note: str = ""
    graph: str = ""

    @property
    def ratios(self) -> list[float]:
        """Time relative to the layer, for each round."""
        return [own / layer for own, layer in zip(self.seconds, self.layer, strict=True)]

    @property
    def ratio(self) -> float | None:
        """Median ratio; None if nothing was timed or a round failed."""
        return statistics.median(self.ratios) if self.seconds and not self.error else None


def above(rows: Sequence[Row], limit: float = 1.0) -> list[Row]:
    """Rows with a ratio above `limit`, in decreasing order."""
    slow = [row for row in rows if row.ratio is not None and row.ratio > limit]
    return sorted(slow, key=lambda row: -(row.ratio or 0.0))


def to_json(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Serialise rows and settings; `from_json` is the inverse."""
    return json.dumps({"settings": settings, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)


def from_json(text: str) -> tuple[list[Row], dict[str, Any]]:
    """Read rows and settings from `to_json`."""
    read = json.loads(text)
    return [Row(**row) for row in read["rows"]], read["settings"]


# ------------------------------------------------------------------------------------------------------ measuring


class PrunerBench:
    """Times pruners in turns with one decoder layer; `rows` are filled during `run`, which can be interrupted.

    Args:
        names: names, dotted paths or configs of pruners.
        cells: input sizes.
        rounds: rounds of the layer and every pruner, in alternating order.
        device, dtype: device and dtype of the views (attention is always fp32).
        full: time the layer with all samples; otherwise with one sample, multiplied by the number of samples.
        sizes: sizes of the model.

    Raises:
        ValueError: fewer than one round.
    """

    def __init__(
        self,
        names: Sequence[str | dict[str, Any]],
        cells: Sequence[Cell],
        rounds: int = 3,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        full: bool = False,
        sizes: Sizes | None = None,
    ) -> None:
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}; use 3 or more.")
        self.cells, self.rounds, self.device, self.dtype, self.full = cells, rounds, device, dtype, full
        self.sizes = sizes or Sizes()
        self.on_gpu = torch.device(device).type == "cuda"
        self._pruners = {name if isinstance(name, str) else json.dumps(name): name for name in names}
        self.rows = [Row(name, cell.tokens, cell.batch, cell.keep) for cell in cells for name in self._pruners]

    @property
    def steps(self) -> int:
        """Number of steps of `run` if nothing fails."""
        graphs = len(self._pruners) if self.on_gpu else 0
        return len(self.cells) * ((1 + self.rounds) * (1 + len(self._pruners)) + graphs)

    def run(self) -> Iterator[str]:
        """Measure all rows; yields a description before each step."""
        layer = Layer(self.sizes, self.device, self.dtype)
        for cell in self.cells:
            rows = [row for row in self.rows if (row.tokens, row.batch) == (cell.tokens, cell.batch)]
            yield from self._measure(cell, rows, layer)

    def _measure(self, cell: Cell, rows: list[Row], layer: Layer) -> Iterator[str]:
        where = f"{cell.tokens} x {cell.batch}"
        samples = cell.batch if self.full else 1
        prefill = layer.prefill(cell.tokens, samples)
        views = Views(self.sizes, cell, self.device, self.dtype)
        pruners = {id(row): pruner for row in rows if (pruner := self._create(row)) is not None}
        # Sorted so that consecutive pruners share most of their views.
        order = sorted((row for row in rows if id(row) in pruners), key=lambda row: sorted(pruners[id(row)].needs))
        for round_ in range(-1, self.rounds):  # the first round is a warm-up
            yield f"{where}: layer"
            seconds = clock(prefill, self.device) * cell.batch / samples
            for row in order if round_ % 2 else reversed(order):
                yield f"{where}: {row.pruner}"
                if row.error:
                    continue
                try:
                    taken = _time(pruners[id(row)], views, self.device, check=round_ < 0)
                except Exception as error:  # recorded in the table; the other pruners are still measured
                    row.error = first_line(error)
                    continue
                if round_ >= 0:
                    row.seconds.append(taken)
                    row.layer.append(seconds)
        for row in order if self.on_gpu else ():
            yield f"{where}: graph of {row.pruner}"
            if not row.error and pruners[id(row)].exact_count:
                row.graph = capture(pruners[id(row)], views.make(pruners[id(row)]), budget(cell, self.device))

    def _create(self, row: Row) -> Pruner | None:
        try:
            pruner = create(self._pruners[row.pruner])
            if pruner.keeps_none:
                row.note = "retains no token, so there is no selection to time"
                return None
            pruner.build(self.sizes.hidden)
            return pruner.to(self.device).eval()
        except Exception as error:  # recorded in the table; the other pruners are still measured
            row.error = first_line(error)
            return None


def _time(pruner: Pruner, views: Views, device: str, check: bool) -> float:
    """Seconds of one selection; `check` also verifies the number of retained tokens."""
    num_keep_B = budget(views.cell, device)
    selections: list[Selection] = []
    select = partial(pruner, views.make(pruner), num_keep_B)
    seconds = clock(lambda: selections.append(select()), device)
    if check and pruner.exact_count:
        kept = selections[0].keep_BV.sum(1).tolist()
        if kept != num_keep_B.tolist():
            raise ValueError(f"{pruner.name} kept {kept} of {views.cell.tokens}, expected {num_keep_B.tolist()}.")
    return seconds


def budget(cell: Cell, device: str) -> Tensor:
    """The counts (B,) on the host; pinned for a GPU, so that copying them does not sync."""
    num_keep_B = torch.full((cell.batch,), cell.keep)
    return num_keep_B.pin_memory() if torch.device(device).type == "cuda" else num_keep_B


class Layer:
    """A Llama decoder layer with random weights.

    Args:
        sizes: widths of the layer, and number of text tokens.
        device, dtype: device and dtype of the layer.
    """

    def __init__(self, sizes: Sizes, device: str, dtype: torch.dtype) -> None:
        config = LlamaConfig(
            hidden_size=sizes.hidden, intermediate_size=sizes.mlp, num_attention_heads=sizes.heads, num_hidden_layers=1
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        self.sizes, self.device, self.dtype = sizes, device, dtype
        self.module = LlamaDecoderLayer(config, 0).to(device, dtype).eval()
        self.rotary = LlamaRotaryEmbedding(config).to(device)

    def prefill(self, tokens: int, samples: int) -> Run:
        """One pass over vision and text tokens; the rotary embedding, which all layers share, is not included."""
        length = tokens + self.sizes.words
        hidden_BSD = torch.randn(samples, length, self.sizes.hidden, device=self.device).to(self.dtype)
        positions = self.rotary(hidden_BSD, torch.arange(length, device=self.device)[None])
        return partial(self.module, hidden_BSD, position_embeddings=positions)


@torch.no_grad()
def clock(run: Run, device: str) -> float:
    """Seconds of one run: processor time on a CPU, or time between events on the stream of a GPU."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        if torch.device(device).type != "cuda":
            return timed(run).cpu
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    finally:
        if collecting:
            gc.enable()


@torch.no_grad()
def capture(pruner: Pruner, view: TokenView, num_keep_B: Tensor) -> str:
    """Whether a CUDA graph can capture a selection with a fixed budget: "yes", or "no: reason".

    Args:
        pruner: pruner with an exact count.
        view: view on a GPU.
        num_keep_B: pinned counts, because a graph cannot read pageable host memory.
    """
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture would leave its own stream active
            expected_BV = pruner(view, num_keep_B).keep_BV
            _rehearse(partial(pruner, view, num_keep_B))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = pruner(view, num_keep_B)
            graph.replay()
            torch.cuda.synchronize()
            same = torch.equal(captured.keep_BV, expected_BV)
    except Exception as error:  # torch raises several types; the first one describes the cause
        return f"no: {first_line(error.__context__ or error)}"
    return "yes" if same else "no: the replay retains other tokens"


def _rehearse(run: Run) -> None:
    """Run once on a side stream, to initialise libraries, with an error on any host-device sync.

    A sync inside a capture would fail as well, but can break the memory allocator for later captures.
    """
    aside, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    aside.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(aside):
            run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(aside)
