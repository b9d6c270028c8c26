"""Vision tokens of a test: those of the model without pruning, and those that the stages of a plan retain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tpcompress.data.collate import BatchMeta
from tpcompress.families import resolve
from tpcompress.inference import inputs_for
from tpcompress.insertion.encode import layouts_of
from tpcompress.insertion.trace import Trace


def mean_vision_tokens(model: Any, batches: Iterable[Mapping[str, Any]]) -> float | None:
    """Vision tokens of a question, of all its images, in the mean over questions with an image; None without one.

    Args:
        model: the model, dense.
        batches: its inputs, which are encoded for it.
    """
    parts, tokens, number = resolve(model), 0, 0
    marks = torch.tensor(list(parts.placeholder_ids.values()))
    with torch.no_grad():
        for batch in batches:
            inputs = inputs_for(parts.model, {name: value for name, value in batch.items() if name != "meta"})
            tokens += sum(layout.count for listed in layouts_of(parts, inputs).values() for layout in listed)
            number += int(torch.isin(batch["input_ids"], marks).any(1).sum())
    return whole(tokens / number) if number else None


class Counted:
    """Vision tokens before and after every stage, summed over the questions of a test."""

    def __init__(self) -> None:
        self.stages: dict[int, tuple[int, int, int, int]] = {}

    def add(self, trace: Trace) -> None:
        """Add the record of a batch. A question may have several budget rows, one per image."""
        for stage in trace.stages:
            _, questions, before, after = self.stages.get(stage.stage, (0, 0, 0, 0))
            questions += len(set(stage.owner))
            self.stages[stage.stage] = (
                stage.layer,
                questions,
                before + sum(stage.vision_in),
                after + sum(stage.vision_out),
            )

    def watch(self, trace: Trace, meta: BatchMeta) -> None:
        """`add`, as callback of a test."""
        self.add(trace)

    def means(self, depth: int) -> tuple[float | None, float | None]:
        """Tokens of a question after the last stage, and on the average layer; None if no stage was reached.

        Args:
            depth: decoder layers.
        """
        if not self.stages:
            return None, None
        stages = [self.stages[index] for index in sorted(self.stages)]
        first = stages[0]
        counts = [(0, first[2] / first[1]), *((layer, after / number) for layer, number, _, after in stages)]
        ends = [layer for layer, _ in counts[1:]] + [depth]
        average = sum(count * (end - start) for (start, count), end in zip(counts, ends, strict=True)) / depth
        return whole(counts[-1][1]), whole(average)


def whole(value: float) -> float:
    """A count as an int where it is whole."""
    return int(value) if value == int(value) else value
