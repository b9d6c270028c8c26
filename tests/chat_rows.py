"""Chat rows, and the tiny processors and models of families that collate and read them."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from support import family_folder
from transformers import AutoModelForImageTextToText, AutoProcessor

Batch = dict[str, Any]


@cache
def processor_of(name: str) -> Any:
    return AutoProcessor.from_pretrained(family_folder(name))


@cache
def model_of(name: str) -> Any:
    return AutoModelForImageTextToText.from_pretrained(family_folder(name)).eval()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def row(*messages: str, images: tuple[Any, ...] = (), videos: tuple[Any, ...] = (), system: str = "") -> Batch:
    talk = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(messages)]
    first = [{"role": "system", "content": system}] if system else []
    return {
        "id": messages[0], "images": list(images), "videos": list(videos), "families": ["chat"],
        "conversations": [first + talk],
    }  # fmt: skip


ONE = row("<image>\nwhat is red?", "the ball", images=(photo(40, 30),))
UNMARKED = row("which colour is it?", "green, and\n\nblue", images=(photo(90, 90, 1),))
TWO = row("<image>\n<image>\nwhich is larger?", "the left one", images=(photo(64, 20, 2), photo(50, 120, 3)))
WORDS = row("how many legs has a spider?", "eight")
TURNS = row("<image>\nwhat?", "a red door", "where?", "on the right", images=(photo(33, 70, 4),), system="be brief.")


def tensors(batch: Any) -> Batch:
    """What reaches the model, without labels: PaliGemma's attention depends on whether there are any."""
    return {key: torch.as_tensor(value) for key, value in batch.items() if key not in ("meta", "labels")}
