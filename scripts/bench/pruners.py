"""What choosing costs: the time of every pruner relative to the prefill of one decoder layer of a 7B Llama.

Only `pruner(view, num_keep_B)` is timed, over views drawn at random. What it costs to build them in a model (recomputed
attention rows, keys, views of the vision tower) belongs to insertion, not to the rule.
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
from tpcompress.pruners import Pruner, Selection, TokenView, create

Run = Callable[[], Any]


@dataclass
class Row:
    """One pruner in one cell.

    Attributes:
        pruner, tokens, batch, keep: which.
        seconds: of each round: processor time on a CPU, between two events on a GPU.
        layer: of one decoder layer in the same round.
        error: why there is no time.
        note: why it was left out.
        graph: whether a CUDA graph holds it: "yes", "no: why", or "" where nobody tried.
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
        """Of its time to the layer's, round by round."""
        return [own / layer for own, layer in zip(self.seconds, self.layer, strict=True)]

    @property
    def ratio(self) -> float | None:
        """Their median; None where nothing was timed, or a round failed."""
        return statistics.median(self.ratios) if self.seconds and not self.error else None


def above(rows: Sequence[Row], limit: float = 1.0) -> list[Row]:
    """Rows that take longer than `limit` layers, the longest first."""
    slow = [row for row in rows if row.ratio is not None and row.ratio > limit]
    return sorted(slow, key=lambda row: -(row.ratio or 0.0))


def to_json(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Rows and what they were measured with; `from_json` is the inverse."""
    return json.dumps({"settings": settings, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)


def from_json(text: str) -> tuple[list[Row], dict[str, Any]]:
    """Rows and settings that `to_json` wrote."""
    read = json.loads(text)
    return [Row(**row) for row in read["rows"]], read["settings"]


# ------------------------------------------------------------------------------------------------------ measuring


class PrunerBench:
    """Times pruners in turns with one decoder layer; `rows` fill while `run` goes on, so it may be interrupted.

    Args:
        names: pruners: names, dotted paths or configs.
        cells: sizes to time them at.
        rounds: each of the layer and every pruner, the pruners forwards and backwards by turns.
        device, dtype: of everything but attention, which is fp32, and the pruners' own weights.
        full: time the layer with all samples; otherwise with one, times the number of samples.
        sizes: of the model.

    Raises:
        ValueError: no round at all.
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
            raise ValueError(f"{rounds} rounds measure nothing; take at least 1, better 3.")
        self.cells, self.rounds, self.device, self.dtype, self.full = cells, rounds, device, dtype, full
        self.sizes = sizes or Sizes()
        self.on_gpu = torch.device(device).type == "cuda"
        self._pruners = {name if isinstance(name, str) else json.dumps(name): name for name in names}
        self.rows = [Row(name, cell.tokens, cell.batch, cell.keep) for cell in cells for name in self._pruners]

    @property
    def steps(self) -> int:
        """How many things `run` will do, if nothing fails."""
        graphs = len(self._pruners) if self.on_gpu else 0
        return len(self.cells) * ((1 + self.rounds) * (1 + len(self._pruners)) + graphs)

    def run(self) -> Iterator[str]:
        """Measure everything; yields what comes next, before it starts."""
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
        # Neighbours in this order share most of their views.
        order = sorted((row for row in rows if id(row) in pruners), key=lambda row: sorted(pruners[id(row)].needs))
        for round_ in range(-1, self.rounds):  # the first one warms up
            yield f"{where}: layer"
            seconds = clock(prefill, self.device) * cell.batch / samples
            for row in order if round_ % 2 else reversed(order):
                yield f"{where}: {row.pruner}"
                if row.error:
                    continue
                try:
                    taken = _time(pruners[id(row)], views, self.device, check=round_ < 0)
                except Exception as error:  # whatever it is, the others go on
                    row.error = _line(error)
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
                row.note = "retains nothing: there is no choice to time"
                return None
            pruner.build(self.sizes.hidden)
            return pruner.to(self.device).eval()
        except Exception as error:
            row.error = _line(error)
            return None


def _time(pruner: Pruner, views: Views, device: str, check: bool) -> float:
    """Seconds of one choice; with `check` also that it keeps its budget."""
    num_keep_B = budget(views.cell, device)
    answer: list[Selection] = []
    choose = partial(pruner, views.make(pruner), num_keep_B)
    seconds = clock(lambda: answer.append(choose()), device)
    if check and pruner.exact_count:
        kept = answer[0].keep_BV.sum(1).tolist()
        if kept != num_keep_B.tolist():
            raise ValueError(f"{pruner.name} kept {kept} of {views.cell.tokens}, asked for {num_keep_B.tolist()}.")
    return seconds


def budget(cell: Cell, device: str) -> Tensor:
    """The counts (B,) on the host, pinned if a GPU is to read them without waiting."""
    num_keep_B = torch.full((cell.batch,), cell.keep)
    return num_keep_B.pin_memory() if torch.device(device).type == "cuda" else num_keep_B


class Layer:
    """A Llama decoder layer of random weights.

    Args:
        sizes: its widths, and how many words stand beside the vision tokens.
        device, dtype: where it is.
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
        """One pass over vision tokens and words; cosines and sines, which all layers share, are there before."""
        length = tokens + self.sizes.words
        hidden_BSD = torch.randn(samples, length, self.sizes.hidden, device=self.device).to(self.dtype)
        positions = self.rotary(hidden_BSD, torch.arange(length, device=self.device)[None])
        return partial(self.module, hidden_BSD, position_embeddings=positions)


@torch.no_grad()
def clock(run: Run, device: str) -> float:
    """Seconds of one run: of the processor, which busy neighbours hardly touch, or of a GPU's stream with its gaps."""
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
    """Whether a CUDA graph can hold a choice of fixed budget: "yes", or "no" and why.

    Args:
        pruner: an exact one.
        view: on a GPU.
        num_keep_B: pinned, because a graph cannot read other host memory.
    """
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):  # a capture that fails would leave us on its own stream
            expected_BV = pruner(view, num_keep_B).keep_BV
            _rehearse(partial(pruner, view, num_keep_B))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = pruner(view, num_keep_B)
            graph.replay()
            torch.cuda.synchronize()
            same = torch.equal(captured.keep_BV, expected_BV)
    except Exception as error:  # torch raises several kinds here; the first one says what the pruner did
        return f"no: {_line(error.__context__ or error)}"
    return "yes" if same else "no: its replay retains other tokens"


def _rehearse(run: Run) -> None:
    """One run beside the current stream, where libraries set themselves up, that refuses any wait for the device.

    A wait inside a capture would fail, too, but can break the memory allocator for captures after it.
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


def _line(error: BaseException) -> str:
    """The first line of a message, which is what a table can hold."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
