"""Mistral Small 3.1 and Ministral 3: images of any size; the tokens that end rows have their own ids and are text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Mistral3Config

from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Layout, plain
from tpcompress.families.tiny import END, IMAGE, NEWLINE, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import image_processor, tiny_tokenizer, turns


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One token per square of patches, within the size of the unpadded image."""
    step = config.vision_config.patch_size * config.spatial_merge_size
    shapes = torch.as_tensor(inputs["image_sizes"]) // step
    return [plain(rows, cols) for rows, cols in shapes.tolist()]


def reads_positions(config: Any) -> bool:
    """Ministral 3 scales queries by their position."""
    return bool(config.get_text_config().model_type == "ministral3")


# ------------------------------------------------------------------------------------------------ test fixture

SIZES = {"image": (6, 8), "wide": (4, 11)}
"""Rows and columns of tokens by kind."""


def tiny_config(text: str = "mistral") -> Mistral3Config:
    """4 px patches, 2 x 2 of them per token; `ministral3` scales queries by their position."""
    more: dict[str, Any] = {"head_dim": 16, "sliding_window": None}
    if text == "ministral3":
        more["rope_parameters"] = {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 32,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        }  # fmt: skip
    return Mistral3Config(
        text_config=tiny_text(text, **more),
        vision_config=tiny_vision("pixtral", image_size=128, head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def tiny_run(config: Any, kind: str) -> list[int]:
    """A newline after every row but the last, which is followed by an end token."""
    rows, cols = SIZES[kind]
    return [*([*[IMAGE] * cols, NEWLINE] * rows)[:-1], END]


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Images padded to the largest one, and their sizes (images, 2)."""
    step = config.vision_config.patch_size * config.spatial_merge_size
    sizes = [(SIZES[kind][0] * step, SIZES[kind][1] * step) for sample in samples for kind in sample]
    if not sizes:
        return {}
    pixels = torch.zeros(len(sizes), 3, max(size[0] for size in sizes), max(size[1] for size in sizes))
    for image, (height, width) in zip(pixels, sizes, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def tiny_processor(config: Any) -> Any:
    """Images of up to 64 pixels; system prompt and instructions between tags."""
    from transformers import PixtralProcessor

    special = {0: "<pad>", 1: "<s>", 2: "</s>", IMAGE: "[IMG]", NEWLINE: "[IMG_BREAK]", END: "[IMG_END]"}
    special |= {105: "[INST]", 106: "[/INST]", 107: "[SYSTEM_PROMPT]", 108: "[/SYSTEM_PROMPT]"}
    roles = {
        "system": ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "user": ("[INST]", "[/INST]"), "assistant": ("", "</s>"),
    }  # fmt: skip
    return PixtralProcessor(
        image_processor("PixtralImageProcessor", size={"longest_edge": 64}),
        tiny_tokenizer(special, {}, bos=True),
        patch_size=config.vision_config.patch_size,
        spatial_merge_size=config.spatial_merge_size,
        chat_template=turns(roles, "", "[IMG]", start="<s>"),
    )


# ------------------------------------------------------------------------------------------------------ family

MISTRAL3 = Family(
    name="mistral3",
    model_types=("mistral3",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    image_layouts=image_layouts,
    reads_positions=reads_positions,
    packages=("torchvision",),
    tiny=Tiny(
        tiny_config,
        tiny_pixels,
        tiny_run,
        tuple(SIZES),
        variants=(("mistral",), ("ministral3",)),
        processor=tiny_processor,
    ),  # fmt: skip
)
