"""Downsampling baseline: fewer vision tokens through smaller images, without a pruner and without training.

    with downsampled(model, processor, 36) as smaller:
        evaluate(model, smaller.processor, rows)

Towers with a fixed grid (CLIP, SigLIP) get smaller images and interpolate their position embeddings; processors that
choose the image size themselves get a lower limit, and those that split images into tiles split them into fewer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tpcompress.evaluation.tiles import CannotDownsample, fewer_tiles
from tpcompress.families import Parts, resolve
from tpcompress.inference import inputs_for
from tpcompress.insertion.attach import base_of
from tpcompress.insertion.encode import layouts_of

STRETCH = 1.5
"""Maximum change of the aspect ratio of a fixed grid, which allows grids closer to the budget."""
INTERPOLATES = "interpolate_pos_encoding"


@dataclass(frozen=True)
class Smaller:
    """A processor that returns smaller images.

    Attributes:
        processor: processor whose number of placeholders matches the smaller images.
        grid: rows and columns of vision tokens; None if images keep their own aspect ratios.
    """

    processor: Any
    grid: tuple[int, int] | None


@contextmanager
def downsampled(model: nn.Module, processor: Any, keep_tokens: int) -> Iterator[Smaller]:
    """Run a block in which a model accepts smaller images, with or without an attached plan.

    Args:
        model: vision-language model.
        processor: processor of the model, which is not changed.
        keep_tokens: vision tokens per image. Fixed grids get the largest grid of a similar aspect ratio with at most as
            many tokens; images of variable size get at most as many.

    Raises:
        CannotDownsample: the image size of this model cannot be changed.
        ValueError: `keep_tokens` is not a positive integer.
    """
    if isinstance(keep_tokens, bool) or not isinstance(keep_tokens, int) or keep_tokens < 1:
        raise ValueError(f"keep_tokens must be a whole number of at least 1, got {keep_tokens!r}.")
    parts = resolve(base_of(model))
    if _chooses_size(processor.image_processor):
        smaller = _limited(processor, keep_tokens)
        _check(parts, smaller, keep_tokens)
        yield smaller
        return
    if (fewer := fewer_tiles(parts, processor, keep_tokens)) is not None:
        smaller = Smaller(_with(processor, fewer), None)
        _check(parts, smaller, keep_tokens)
        yield smaller
        return
    smaller = _shrunk(parts, processor, keep_tokens)
    handle = parts.vision_tower.register_forward_pre_hook(_interpolating, with_kwargs=True)
    try:
        _check(parts, smaller, keep_tokens)
        yield smaller
    finally:
        handle.remove()


def smaller_grid(rows: int, cols: int, keep_tokens: int) -> tuple[int, int]:
    """The largest grid with at most `keep_tokens` tokens whose aspect ratio differs from (rows, cols) by at most 1.5.

    Ties are resolved by the smallest change of the aspect ratio; if no grid meets the limit (very few tokens), the grid
    with the smallest change is returned.
    """
    found = []
    for tall in range(1, min(rows, keep_tokens) + 1):
        for wide in range(1, min(cols, keep_tokens // tall) + 1):
            stretch = max(tall * cols / (wide * rows), wide * rows / (tall * cols))
            fits = stretch <= STRETCH
            found.append(((fits, tall * wide if fits else 0, -stretch, tall * wide), (tall, wide)))
    return max(found)[1]


def _shrinking(plain: Any, height: int, width: int) -> Any:
    """An image processor whose outputs are resized: the same crop of the image, with fewer pixels."""

    class Shrinking(type(plain)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            made = super().__call__(*args, **kwargs)
            pixels = made["pixel_values"]
            values = pixels if isinstance(pixels, Tensor) else torch.from_numpy(np.stack(pixels))
            smaller = F.interpolate(
                values.float(), (height, width), mode="bilinear", align_corners=False, antialias=True
            )
            made["pixel_values"] = smaller.to(values.dtype)
            return made

    changed = copy.copy(plain)
    changed.__class__ = Shrinking  # not a wrapper, because processors serialise their parts by type
    return changed


def _chooses_size(image_processor: Any) -> bool:
    """Whether images keep their aspect ratios, within limits on their pixels (such as Qwen2-VL)."""
    size = getattr(image_processor, "size", None) or {}
    limits = all(getattr(size, "get", lambda key: None)(name) for name in ("shortest_edge", "longest_edge"))
    return limits and bool(getattr(image_processor, "merge_size", None))


def _limited(processor: Any, keep_tokens: int) -> Smaller:
    """Set a lower limit on pixels; in these processors both edges of `size` are areas."""
    changed = copy.deepcopy(processor.image_processor)
    area = (changed.patch_size * changed.merge_size) ** 2
    most = min(changed.size["longest_edge"], keep_tokens * area)
    changed.size = {"shortest_edge": min(changed.size["shortest_edge"], most), "longest_edge": most}
    return Smaller(_with(processor, changed), None)


def _shrunk(parts: Parts, processor: Any, keep_tokens: int) -> Smaller:
    """Resize after the image processor, for towers that can interpolate their position embeddings."""
    config = parts.model.config.vision_config
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if INTERPOLATES not in inspect.signature(parts.vision_tower.forward).parameters:
        raise CannotDownsample(_refusal(parts, f"{type(parts.vision_tower).__name__} cannot interpolate its positions"))
    if not isinstance(side, int) or not isinstance(patch, int):
        raise CannotDownsample(_refusal(parts, "its tower has no single image size"))
    pixels = processor.image_processor(images=[_sample()], return_tensors="pt").get("pixel_values")
    if not isinstance(pixels, Tensor) or tuple(pixels.shape) != (1, 3, side, side):
        raise CannotDownsample(_refusal(parts, "its processor splits images into tiles, or chooses their sizes"))
    rows, cols = smaller_grid(side // patch, side // patch, keep_tokens)
    image_processor = _shrinking(processor.image_processor, rows * patch, cols * patch)
    return Smaller(_with(processor, image_processor), (rows, cols))


def _check(parts: Parts, smaller: Smaller, keep_tokens: int) -> None:
    """Check that placeholders and encoder agree: some processors have fixed counts, some projectors fixed grids."""
    processor = smaller.processor
    inputs = dict(processor(text=[processor.image_token], images=[_sample()], return_tensors="pt"))
    try:
        (layout,) = layouts_of(parts, inputs_for(parts.vision_tower, inputs))["image"]
    except (RuntimeError, ValueError) as error:
        raise CannotDownsample(
            _refusal(parts, f"its encoder rejects smaller images ({type(error).__name__})")
        ) from error
    placeholders = int((inputs["input_ids"] == parts.placeholder_ids["image"]).sum())
    if placeholders != layout.placeholders:
        why = f"its processor returns {placeholders} placeholders for an image of {layout.placeholders} tokens"
        raise CannotDownsample(_refusal(parts, why))
    if layout.count > keep_tokens or smaller.grid not in (None, (layout.grids[0].rows, layout.grids[0].cols)):
        raise CannotDownsample(_refusal(parts, f"an image of {keep_tokens} tokens was encoded to {layout.count}"))


def _refusal(parts: Parts, why: str) -> str:
    return f"images of {parts.family.name} cannot be downsampled: {why}."


def _with(processor: Any, image_processor: Any) -> Any:
    """A shallow copy of a processor with another image processor."""
    changed = copy.copy(processor)
    changed.image_processor = image_processor
    return changed


def _interpolating(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pre-hook that enables the tower's own interpolation, which the enclosing model does not expose."""
    return args, {**kwargs, INTERPOLATES: True}


def _sample() -> Image.Image:
    return Image.new("RGB", (224, 224), (127, 127, 127))
