"""View `pixels`: the pixels of each vision token's patches, as the vision tower gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompress.families import Parts, Tower
from tpcompress.families.base import ToTokens
from tpcompress.insertion.views.registry import captures
from tpcompress.insertion.views.stage_context import StageContext


def pixel_tokens(tower: Tower) -> ToTokens | None:
    """How the pixels of patches become those of vision tokens."""
    return tower.pixels or tower.to_tokens


def images_per_token(stage: StageContext) -> dict[str, Any]:
    """The field with the number of images in the pixels of a token."""
    tower = stage.parts.family.tower
    assert tower is not None
    return {"pixel_images": tower.images(stage.parts.model.config)}


@captures("pixels", "tower_input", to_tokens=pixel_tokens, more=images_per_token)
def pixels(x: Tensor, parts: Parts) -> Tensor:
    """Pixels (T, P, C * height * width) of the patches of each image."""
    return patches(x.detach(), parts.model.config.vision_config.patch_size)


def patches(x: Tensor, patch_size: int | Sequence[int]) -> Tensor:
    """The pixels of each patch, (T, P, C * height * width), from images (T, C, H, W) or from patches (P, ...)."""
    if x.ndim == 2:
        return x[None]
    side = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    return torch.nn.functional.unfold(x.float(), side, stride=side).mT
