"""Rows and columns behind the real processors: a corner of an image changes the token that the layout puts there.

`test_families` does the same where pixels are images; here the processors cut, merge and pack them on their own.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support import tiny_model
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from tpcompress.families import Layout, resolve
from tpcompress.families.llava_next import PINPOINTS

MERGING = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096}}
TILING = {
    "size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}, "image_grid_pinpoints": PINPOINTS,
}  # fmt: skip
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_vl": MERGING,
    "qwen2_5_vl": MERGING,
    "qwen3_vl": MERGING,
    "qwen3_5": MERGING,
    "glm4v": MERGING,
    "paddleocr_vl": MERGING,
    "ernie4_5_vl_moe": MERGING,
    "gemma4": {"patch_size": 2, "pooling_kernel_size": 3, "max_soft_tokens": 70},
    "llava_next": TILING,
    "llava_onevision": TILING | {"size": {"height": 16, "width": 16}},
    "mistral3": {"patch_size": 8, "size": {"longest_edge": 128}},
}
"""Families whose processors do more than resize, and arguments that fit their tiny models."""


def encode(parts: Any, processor: Any, picture: np.ndarray) -> tuple[torch.Tensor, Layout]:
    """The tokens that the model makes of an image (placeholders, D), and how they lie."""
    made = processor(images=[Image.fromarray(picture)], return_tensors="pt")
    names = inspect.signature(parts.core.get_image_features).parameters
    arguments = {name: value for name, value in made.items() if name in names}
    with torch.no_grad():
        output = parts.core.get_image_features(**arguments, return_dict=True).pooler_output
    tokens = [x.flatten(0, -2) for x in output]
    (layout,) = parts.family.image_layouts(parts.model.config, arguments, [len(x) for x in tokens])
    return tokens[0], layout


@pytest.mark.parametrize("size", [(48, 80), (80, 40)], ids=["wide", "tall"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_corner_changes_the_token_that_lies_there(name: str, size: tuple[int, int]) -> None:
    parts = resolve(tiny_model(name, *(("small",) if name == "gemma4" else ())))
    kind = IMAGE_PROCESSOR_MAPPING_NAMES[parts.model.config.model_type]["pil"]
    processor = getattr(transformers, kind)(**PROCESSORS[name])
    picture = np.random.default_rng(0).integers(96, 160, (*size, 3), dtype=np.uint8)
    before, layout = encode(parts, processor, picture)
    assert len(before) == layout.placeholders
    last = len(layout.grids) - 1
    grid, table = layout.grids[last], layout.table[layout.table[:, 3] == last]
    assert (grid.rows < grid.cols) == (size[0] < size[1]), "a picture that is not square tells rows from columns"
    for row, col in ((0, 0), (0, grid.cols - 1), (grid.rows - 1, 0), (grid.rows - 1, grid.cols - 1)):
        corner = picture.copy()
        top, bottom = (round(i * size[0] / grid.rows) for i in (row, row + 1))
        left, right = (round(i * size[1] / grid.cols) for i in (col, col + 1))
        corner[top:bottom, left:right] = 255
        after, _ = encode(parts, processor, corner)
        gap = (after - before).norm(dim=-1)[table[:, 0]]
        assert divmod(int(gap.argmax()), grid.cols) == (row, col)
