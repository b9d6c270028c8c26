"""Measure the collator against the bare processor: processor time per row, in turns, on the same images.

The bare processor renders, tokenizes and processes all conversations of a batch in one call of `apply_chat_template`.
The collator also labels the answers, hashes the content of every row and joins rows.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from tpcompress.data import ChatCollator, GoodRows
from tpcompress.families import list_families

HUB_SIZES = {
    "gemma3": {"size": {"height": 896, "width": 896}},
    "llava": {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    "mistral3": {"size": {"longest_edge": 1540}},
    "paligemma": {"size": {"height": 448, "width": 448}},
}
"""Sizes of published models where they are not the default of the image processor."""


@dataclass
class Row:
    """Measurements of one family.

    Attributes:
        family: name of the family.
        collator, bare, single: processor time per row in seconds, one entry per round, of the collator and of the bare
            processor with a batch per call and with a row per call.
        error: why it was not measured.
    """

    family: str
    collator: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ratios(self) -> tuple[float, float] | None:
        """Medians of the collator's time relative to the bare processor's with a batch and with a row per call."""
        if not self.collator:
            return None
        found = [
            statistics.median(own / other for own, other in zip(self.collator, others, strict=True))
            for others in (self.bare, self.single)
        ]
        return found[0], found[1]


def processor_of(family: str, full_size: bool = True) -> Any:
    """The processor of a family with a tiny vocabulary.

    Args:
        family: name of the family.
        full_size: process images to the default sizes of its image processor; to those of tiny models otherwise.
    """
    from transformers import AutoProcessor

    tiny = list_families()[family].tiny
    config = tiny.config(*(tiny.saved or tiny.variants[0]))
    with tempfile.TemporaryDirectory() as folder:
        tiny.processor(config).save_pretrained(folder)
        config.save_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
    if full_size:
        processor.image_processor = type(processor.image_processor)(**HUB_SIZES.get(family, {}))
    return processor


def make_rows(number: int, width: int, height: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with one image, one question and one answer."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        small = Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        messages = [("user", "<image>\nwhat is in the middle of this image?"), ("assistant", "a red ball " * 12)]
        talk = [{"role": role, "content": content} for role, content in messages]
        rows.append({"images": [small.resize((width, height))], "conversations": [talk], "families": ["chat"]})
    return rows


def bare(processor: Any, rows: list[dict[str, Any]]) -> Callable[[], Any]:
    """A call of the bare processor on all rows."""
    chats = [
        [
            {
                "role": message["role"],
                "content": [
                    *[{"type": "image", "image": image} for image in row["images"] if message["role"] == "user"],
                    {"type": "text", "text": message["content"].removeprefix("<image>\n")},
                ],
            }
            for message in row["conversations"][0]
        ]
        for row in rows
    ]
    return lambda: processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )


def measure(families: list[str], rows: list[dict[str, Any]], rounds: int, full_size: bool = True) -> Iterator[Row]:
    """Time the collator and the bare processor of each family in turns, after a warm-up."""
    for family in families:
        row = Row(family)
        try:
            processor = processor_of(family, full_size)
            collator = ChatCollator(processor)
            singles = [bare(processor, [one]) for one in rows]
            calls: dict[str, Callable[[], Any]] = {
                "collator": partial(collator, rows),
                "bare": bare(processor, rows),
                "single": partial(_each, singles),
            }
            for number in range(rounds + 1):
                for name, call in calls.items():
                    start = time.process_time()
                    call()
                    if number:
                        getattr(row, name).append((time.process_time() - start) / len(rows))
        except (ValueError, ImportError) as error:  # no template, or a package that is not installed
            row = Row(family, error=str(error).splitlines()[0])
        yield row


def _each(calls: list[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]


def waiting(family: str, rows: list[dict[str, Any]], workers: int, step: float, batch_size: int, steps: int) -> float:
    """Share of the time that a training step waits for its batch.

    Args:
        family: name of the family.
        rows: rows, used in turns.
        workers: worker processes.
        step: seconds of a step, which is a pause here.
        batch_size: rows per batch.
        steps: number of steps; the first, which starts the workers, is not counted.
    """
    collator = ChatCollator(processor_of(family))
    many = [rows[index % len(rows)] for index in range(steps * batch_size)]
    loader = DataLoader(
        GoodRows(many, collator.encode), batch_size, collate_fn=collator.pad, num_workers=workers  # type: ignore[arg-type]
    )  # fmt: skip
    waited, start = 0.0, 0.0
    batches = iter(loader)
    for number in range(steps):
        asked = time.perf_counter()
        next(batches)
        if number == 0:
            start = time.perf_counter()
        else:
            waited += time.perf_counter() - asked
        time.sleep(step)
    return waited / (time.perf_counter() - start)
