"""A picture for a batch without one, so that every process calls the same modules; no loss and no gradient sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tpcompress.data import IMAGE_MARKER, ChatCollator
from tpcompress.data.collate import packed_mask
from tpcompress.data.encode import IGNORED
from tpcompress.insertion.encoded import has_pixels

SIZE = 64
"""Edge of the picture in pixels; processors resize it to what their model takes."""


def with_picture(batch: dict[str, Any], collator: ChatCollator) -> tuple[dict[str, Any], bool]:
    """A batch that brings a picture, and whether it had to be added.

    It comes as one more sequence, without an answer: vision tower, projector, pruners and decoder layers run on it,
    and their gradients are exact zeros.

    Args:
        batch: what the collator made, on the device.
        collator: of the run.
    """
    if has_pixels(batch):
        return batch, False
    device = batch["input_ids"].device
    extra = _one_picture(collator)
    width = max(batch["input_ids"].shape[1], extra["input_ids"].shape[1])
    fillers = {"input_ids": collator.pad_id, "labels": IGNORED, "attention_mask": 0, "position_ids": 0}
    joined: dict[str, Any] = {name: value.to(device) for name, value in extra.items() if isinstance(value, Tensor)}
    for name, filler in fillers.items():
        if name in batch and not (name == "attention_mask" and collator.packs):
            joined[name] = _stacked(batch[name], joined[name], width, filler)
    segments = _stacked(batch["meta"].segments, extra["meta"].segments, width, -1)
    if collator.packs:
        joined["attention_mask"] = packed_mask(segments.to(device))
    return joined | {"meta": replace(batch["meta"], segments=segments)}, True


def _one_picture(collator: ChatCollator) -> Mapping[str, Any]:
    messages = [{"role": "user", "content": f"{IMAGE_MARKER}\n."}, {"role": "assistant", "content": "."}]
    row = {"images": [Image.new("RGB", (SIZE, SIZE))], "conversations": [messages], "families": ["none"]}
    batch = collator([row])
    return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


def _stacked(rows_BS: Tensor, row_1S: Tensor, width: int, filler: int) -> Tensor:
    row_1S = row_1S.to(rows_BS.device)
    return torch.cat([F.pad(x, (0, width - x.shape[1]), value=filler) for x in (rows_BS, row_1S)])
