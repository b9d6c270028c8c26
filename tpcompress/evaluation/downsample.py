"""Fewer vision tokens because the picture is smaller: the baseline without any rule (decision: no training, no pruner).

    with downsampled(model, processor, 36) as smaller:
        evaluate(model, smaller.processor, rows)

Towers with a fixed grid (CLIP, SigLIP) get a smaller picture and their own interpolated position embeddings;
processors that choose a picture's size themselves get a lower limit.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tpcompress.families import Parts, resolve
from tpcompress.insertion.attach import base_of
from tpcompress.insertion.encode import layouts_of

STRETCH = 1.5
"""How much taller or wider than the tower's own grid a smaller one may be, so that a budget is met more closely."""
INTERPOLATES = "interpolate_pos_encoding"


@dataclass(frozen=True)
class Smaller:
    """A processor of smaller pictures.

    Attributes:
        processor: makes them, and as many placeholders as they have tokens.
        grid: rows and columns of vision tokens; None where every picture keeps its own shape.
    """

    processor: Any
    grid: tuple[int, int] | None


@contextmanager
def downsampled(model: nn.Module, processor: Any, keep_tokens: int) -> Iterator[Smaller]:
    """Let a model take smaller pictures for a while; a plan may be attached as well.

    Args:
        model: a vision-language model.
        processor: of the model; it stays as it is.
        keep_tokens: vision tokens per picture, met exactly where a grid of nearly the tower's shape has as many, else
            by the next smaller one; pictures of any size get at most as many.

    Raises:
        ValueError: no token asked for, or this model's pictures have a size that cannot be chosen.
    """
    if isinstance(keep_tokens, bool) or not isinstance(keep_tokens, int) or keep_tokens < 1:
        raise ValueError(f"keep_tokens must be a whole number of at least 1, got {keep_tokens!r}.")
    parts = resolve(base_of(model))
    if _chooses_size(processor.image_processor):
        smaller = _limited(processor, keep_tokens)
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
    """The grid of most tokens, at most `keep_tokens`, that is no more than 1.5 times as tall or wide as (rows, cols).

    Among equals the least stretched; where the limit leaves none (very few tokens), the least stretched of all.
    """
    found = []
    for tall in range(1, min(rows, keep_tokens) + 1):
        for wide in range(1, min(cols, keep_tokens // tall) + 1):
            stretch = max(tall * cols / (wide * rows), wide * rows / (tall * cols))
            fits = stretch <= STRETCH
            found.append(((fits, tall * wide if fits else 0, -stretch, tall * wide), (tall, wide)))
    return max(found)[1]


def tokens_per_image(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> float:
    """Placeholders of an image in collated batches, on average.

    Args:
        model: whose placeholders they are.
        batches: with `input_ids` and pixels.
    """
    token = resolve(base_of(model)).placeholder_ids["image"]
    placeholders = sum(int((batch["input_ids"] == token).sum()) for batch in batches)
    return placeholders / sum(len(batch.get("image_grid_thw", batch["pixel_values"])) for batch in batches)


def _shrinking(plain: Any, height: int, width: int) -> Any:
    """An image processor, and a resize of the pictures that it makes: the same part of the image, on fewer pixels."""

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

    settings = copy.copy(plain)
    settings.__class__ = Shrinking  # not a stand-in around it: processors write their parts out by their type
    return settings


def _chooses_size(settings: Any) -> bool:
    """Whether pictures keep their shape, between limits on their pixels (Qwen2-VL and its like)."""
    size = getattr(settings, "size", None) or {}
    limits = all(getattr(size, "get", lambda key: None)(name) for name in ("shortest_edge", "longest_edge"))
    return limits and bool(getattr(settings, "merge_size", None))


def _limited(processor: Any, keep_tokens: int) -> Smaller:
    """A lower limit on pixels; in these processors both edges of `size` are areas."""
    settings = copy.deepcopy(processor.image_processor)
    area = (settings.patch_size * settings.merge_size) ** 2
    most = min(settings.size["longest_edge"], keep_tokens * area)
    settings.size = {"shortest_edge": min(settings.size["shortest_edge"], most), "longest_edge": most}
    return Smaller(_with(processor, settings), None)


def _shrunk(parts: Parts, processor: Any, keep_tokens: int) -> Smaller:
    """A resize behind the image processor, for towers that can interpolate their positions."""
    config = parts.model.config.vision_config
    side, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if INTERPOLATES not in inspect.signature(parts.vision_tower.forward).parameters:
        raise ValueError(_refusal(parts, f"{type(parts.vision_tower).__name__} cannot interpolate its positions"))
    if not isinstance(side, int) or not isinstance(patch, int):
        raise ValueError(_refusal(parts, "its tower has no one picture size"))
    pixels = processor.image_processor(images=[_sample()], return_tensors="pt").get("pixel_values")
    if not isinstance(pixels, Tensor) or tuple(pixels.shape) != (1, 3, side, side):
        raise ValueError(_refusal(parts, "its processor cuts pictures into parts, or into sizes of its own"))
    rows, cols = smaller_grid(side // patch, side // patch, keep_tokens)
    settings = _shrinking(processor.image_processor, rows * patch, cols * patch)
    return Smaller(_with(processor, settings), (rows, cols))


def _check(parts: Parts, smaller: Smaller, keep_tokens: int) -> None:
    """Placeholders and encoder must agree: processors may have their numbers fixed, projectors their grids."""
    processor = smaller.processor
    inputs = dict(processor(text=[processor.image_token], images=[_sample()], return_tensors="pt"))
    weight = next(parts.vision_tower.parameters())
    arguments = {k: v.to(weight.device, weight.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    try:
        (layout,) = layouts_of(parts, arguments)["image"]
    except (RuntimeError, ValueError) as error:
        raise ValueError(_refusal(parts, f"its encoder takes no smaller picture ({type(error).__name__})")) from error
    placeholders = int((inputs["input_ids"] == parts.placeholder_ids["image"]).sum())
    if placeholders != layout.placeholders:
        why = f"its processor writes {placeholders} placeholders for a picture of {layout.placeholders} tokens"
        raise ValueError(_refusal(parts, why))
    if layout.count > keep_tokens or smaller.grid not in (None, (layout.grids[0].rows, layout.grids[0].cols)):
        raise ValueError(_refusal(parts, f"a picture of {keep_tokens} tokens came out with {layout.count}"))


def _refusal(parts: Parts, why: str) -> str:
    return f"Pictures of {parts.family.name} cannot be made smaller: {why}; leave `downsample` out."


def _with(processor: Any, settings: Any) -> Any:
    changed = copy.copy(processor)
    changed.image_processor = settings
    return changed


def _interpolating(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A hook: the tower's own interpolation, which the models around it do not pass on."""
    return args, {**kwargs, INTERPOLATES: True}


def _sample() -> Image.Image:
    return Image.new("RGB", (224, 224), (127, 127, 127))
