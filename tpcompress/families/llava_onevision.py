"""LLaVA-OneVision: tiles as in LLaVA-NeXT, interpolated above a maximum; one tile per image in multi-image samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import LlavaOnevisionConfig

from tpcompress.families import llava_next, llava_next_video
from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Grid, Layout
from tpcompress.families.tiny import IMAGE, VIDEO, tiny_text, tiny_vision
from tpcompress.families.tiny_processor import CHATML, image_processor, square_size, tiny_tokenizer
from tpcompress.families.towers import SHRINKING


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """Overview and tiles of the only image of a sample, or one square grid and a newline for each of several images."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    tiles = int((inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))
    image_sizes = llava_next.as_lists(inputs["image_sizes"])
    per_sample = inputs.get("batch_num_images")
    alone = [True] * len(image_sizes)
    if per_sample is not None:  # without it the model treats every image as the only one
        alone = [int(count) == 1 for count in per_sample for _ in range(int(count))]
    several = Layout((Grid(side, side),), tail=1)
    return [
        llava_next.overview_and_tiles(side, *shrunk(*llava_next.unpadded(config, side, size), tiles * side**2))
        if only else several
        for size, only in zip(image_sizes, alone, strict=True)
    ]  # fmt: skip


def video_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """Frames of half the side, rounded up, and one newline after the last."""
    side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    frames = inputs["pixel_values_videos"].shape[1]
    return [Layout((Grid(side, side),) * frames, tail=1, video=True)] * len(sizes)


def shrunk(rows: int, cols: int, most: int) -> tuple[int, int]:
    """Rows and columns after the interpolation to about `most` tokens."""
    ratio = math.sqrt(rows * cols / most)
    return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)


# ------------------------------------------------------------------------------------------------ test fixture

COUNTS = {"image": 16 + 4 * (6 + 1), "wide": 16 + 2 * (8 + 1), "video": 4 * llava_next_video.FRAMES + 1}
"""Number of placeholders by kind; the 6 x 8 tokens of `image` are interpolated to 4 x 6."""


def tiny_config() -> LlavaOnevisionConfig:
    """Tiles of 4 x 4 vision tokens, interpolated above two tiles, and frames of 2 x 2."""
    return LlavaOnevisionConfig(
        text_config=tiny_text("qwen2"),
        vision_config=tiny_vision("siglip_vision_model", image_size=16, vision_use_head=False),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_aspect_ratio="anyres_max_2",
        image_grid_pinpoints=llava_next.PINPOINTS,
    )


def tiny_ids(config: Any, kind: str) -> list[int]:
    """Placeholders of an image or a video, including newlines."""
    return [VIDEO if kind == "video" else IMAGE] * COUNTS[kind]


TOKENS = CHATML | {IMAGE: "<image>", VIDEO: "<video>"}

TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + ' ' -}}"
    "{%- if message['content'] is string -%}{%- set texts = [message['content']] -%}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'video' -%}{{- '<video>' -}}{%- endfor -%}"
    "{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}"
    "{%- endif -%}"
    "{%- for text in texts -%}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- '\n' + text -}}{%- endgeneration -%}"
    "{%- else -%}{{- '\n' + text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""A blank follows the role of a turn but not that of the generation prompt: no rendering is a prefix of the next."""


def tiny_processor(config: Any) -> Any:
    """Tiles of 16 x 16 pixels; one tile for each of several images, and for every frame."""
    from transformers import LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    side = config.vision_config.image_size
    return LlavaOnevisionProcessor(
        image_processor(
            "LlavaOnevisionImageProcessor", size=square_size(side), image_grid_pinpoints=config.image_grid_pinpoints
        ),
        tiny_tokenizer(TOKENS, {"image_token": "<image>", "video_token": "<video>"}),
        LlavaOnevisionVideoProcessor(size=square_size(side)),
        num_image_tokens=(side // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=TEMPLATE,
    )


# ------------------------------------------------------------------------------------------------------ family

LLAVA_ONEVISION = Family(
    name="llava_onevision",
    model_types=("llava_onevision",),
    vision_tower="model.vision_tower",
    projector="model.multi_modal_projector",
    tower=SHRINKING,
    image_layouts=image_layouts,
    video_layouts=video_layouts,
    tiny=Tiny(
        tiny_config, llava_next_video.tiny_pixels, tiny_ids, ("image", "wide", "video"), processor=tiny_processor
    ),
)
