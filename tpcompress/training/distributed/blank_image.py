"""Adds a blank image to a batch without images where all ranks must call the same modules; losses never read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor

from tpcompress.data import IMAGE_MARKER, ChatCollator
from tpcompress.data.blank import blank_image
from tpcompress.data.encode import IGNORED
from tpcompress.data.packing import packed_mask
from tpcompress.insertion.encoded import has_pixels

SIZE = 64
"""Height and width of the blank image in pixels, before the processor resizes it."""


def with_blank_image_if_needed(trainer: Trainer, batch: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Where all ranks must call the same modules, a batch with at least one image, and whether a blank one was added.

    Args:
        trainer: trainer of the run; without a collator in its data module, the batch is returned as it is.
        batch: output of the collator, on the device.
    """
    collator = getattr(trainer.datamodule, "collator", None)  # type: ignore[attr-defined]
    if collator is None or not ranks_call_same_modules(trainer):
        return batch, False
    return with_blank_image(batch, collator)


def ranks_call_same_modules(trainer: Trainer) -> bool:
    """Whether all ranks must call the same modules: true for FSDP2 and DeepSpeed.

    This includes stage 2, where weights are not sharded: a rank without a gradient for some weight would reduce other
    buckets than the rest, which hangs, or sums gradients of different weights.
    """
    return trainer.lightning_module.device_mesh is not None or hasattr(trainer.strategy, "zero_stage_3")


def with_blank_image(batch: dict[str, Any], collator: ChatCollator) -> tuple[dict[str, Any], bool]:
    """A batch with at least one image, and whether a blank one was added.

    The blank image is one more sequence without an answer: vision tower, projector, pruners and decoder layers run on
    it, and its gradients are exactly 0.

    Args:
        batch: output of the collator, on the device.
        collator: collator of the run.
    """
    if has_pixels(batch):
        return batch, False
    device, layout = batch["input_ids"].device, collator.encoder.layout
    extra = _one_image(collator)
    width = max(batch["input_ids"].shape[1], extra["input_ids"].shape[1])
    fillers = {"input_ids": collator.pad_id, "labels": IGNORED, "attention_mask": 0, "position_ids": 0} | layout.tokens
    images = {name: extra[name] for name in layout.media if name in extra}
    joined = {name: x.to(device) for name, x in layout.join([*[{}] * len(batch["input_ids"]), images]).items()}
    for name, filler in fillers.items():
        if name in batch and not (name == "attention_mask" and collator.packs):
            joined[name] = _stacked(batch[name], extra[name], width, filler)
    segments = _stacked(batch["meta"].segments, extra["meta"].segments, width, -1)
    if collator.packs:
        joined["attention_mask"] = packed_mask(segments.to(device))
    return joined | {"meta": replace(batch["meta"], segments=segments)}, True


def _one_image(collator: ChatCollator) -> Mapping[str, Any]:
    messages = [{"role": "user", "content": f"{IMAGE_MARKER}\n."}, {"role": "assistant", "content": "."}]
    row = {"images": [blank_image((SIZE, SIZE))], "conversations": [messages], "families": ["none"]}
    batch = collator([row])
    return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


def _stacked(rows_BS: Tensor, row_1S: Tensor, width: int, filler: float) -> Tensor:
    row_1S = row_1S.to(rows_BS.device)
    return torch.cat([F.pad(x, (0, width - x.shape[1]), value=filler) for x in (rows_BS, row_1S)])
