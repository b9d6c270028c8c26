"""Qwen2-VL: images and videos of any size, 2 x 2 patches per token, positions in time, height and width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLConfig

from tpcompress.families.base import Family, Tiny
from tpcompress.families.layout import Grid, Layout
from tpcompress.families.tiny import END, IMAGE, START, VIDEO, tiny_text
from tpcompress.families.tiny_processor import CHATML, chatml, image_processor, tiny_tokenizer
from tpcompress.families.towers import MERGING


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One grid per image, from `image_grid_thw`."""
    return merged_grids(config, inputs["image_grid_thw"], sizes, video=False)


def video_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One grid per frame (a pair of frames after the temporal patch), from `video_grid_thw`."""
    return merged_grids(config, inputs["video_grid_thw"], sizes, video=True)


def merged_grids(config: Any, grid_thw: Tensor, sizes: Sequence[int], video: bool) -> list[Layout]:
    """Layouts of grids of patches (frames, rows, columns) after merging squares of `spatial_merge_size` patches.

    Args:
        config: config of the model.
        grid_thw: int (images or videos, 3): grids of patches.
        sizes: token count of each encoder feature.
        video: the grids are videos.

    Raises:
        ValueError: the token counts do not match the grids.
    """
    merge, grids = config.vision_config.spatial_merge_size, grid_thw.tolist()
    layouts = [Layout((Grid(rows // merge, cols // merge),) * frames, video=video) for frames, rows, cols in grids]
    counts = [layout.placeholders for layout in layouts]
    if counts != list(sizes):
        raise ValueError(
            f"Grids {grids} merge to {counts} vision tokens, but the encoder returned {list(sizes)}; "
            "pass pixels and grids as returned by the processor."
        )
    return layouts


# ------------------------------------------------------------------------------------------------ test fixture

SIZES = {"image": (1, 16, 16), "wide": (1, 8, 20), "video": (2, 8, 12)}
"""(frames, rows, columns) in patches by kind."""

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def tiny_config(sliding: bool = False) -> Qwen2VLConfig:
    """64 tokens per image; with `sliding`, every other decoder layer has a window of 48 tokens."""
    kinds = ["sliding_attention" if sliding and layer % 2 else "full_attention" for layer in range(6)]
    window = {"use_sliding_window": sliding, "sliding_window": 48, "layer_types": kinds}
    return Qwen2VLConfig(
        text_config=tiny_text("qwen2_vl_text", rope_parameters=dict(MROPE), **window),
        vision_config={
            "depth": 3, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4,
        },
        **tiny_ids(),
    )  # fmt: skip


def tiny_ids() -> dict[str, Any]:
    """Config entries with the special ids."""
    return {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
    }  # fmt: skip


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Flat patches and grids of all images, and of all videos."""
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs: dict[str, Any] = {}
    for pixels, grid, video in (("pixel_values", "image", False), ("pixel_values_videos", "video", True)):
        shapes = [SIZES[kind] for kinds in samples for kind in kinds if (kind == "video") == video]
        if shapes:
            grids = torch.tensor(shapes)
            inputs[pixels] = torch.randn(int(grids.prod(-1).sum()), width, generator=generator)
            inputs[f"{grid}_grid_thw"] = grids
    return inputs


def tiny_run(config: Any, kind: str) -> list[int]:
    """Placeholders between a start and an end; a video is one run."""
    frames, rows, cols = SIZES[kind]
    count = frames * rows * cols // config.vision_config.spatial_merge_size**2
    return [START] + [VIDEO if kind == "video" else IMAGE] * count + [END]


def token_types(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """1 on images, 2 on videos: the model computes positions from these types."""
    kinds = (input_ids == config.image_token_id).long() + 2 * (input_ids == config.video_token_id).long()
    return {"mm_token_type_ids": kinds}


TOKENS = CHATML | {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}

NAMES = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip

MARKS = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
"""Text of an image and of a video in a chat template."""


def patch_processors(config: Any, images: str = "Qwen2VLImageProcessor", videos: Any = None, frames: int = 1) -> Any:
    """Image and video processor by their names in `ProcessorMixin`: 16 to 64 tokens per image, 4 to 16 per frame.

    Args:
        config: config of the model.
        images: name of the image processor.
        videos: class of the video processor; that of Qwen2-VL without it.
        frames: frames that the sizes of the video processor are for.
    """
    from transformers import Qwen2VLVideoProcessor

    vision, make = config.vision_config, videos or Qwen2VLVideoProcessor
    sizes = {
        "patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }  # fmt: skip
    token = (vision.patch_size * vision.spatial_merge_size) ** 2
    still = {"shortest_edge": 16 * token, "longest_edge": 64 * token}
    moving = {"shortest_edge": frames * 4 * token, "longest_edge": frames * 16 * token}
    return {
        "image_processor": image_processor(images, **sizes, size=still),
        "video_processor": make(**sizes, size=moving, cap_pixels_per_frame=False, min_frames=2),
    }


def tiny_processor(config: Any, name: str = "Qwen2VLProcessor") -> Any:
    """ChatML with a default system prompt."""
    import transformers

    return getattr(transformers, name)(
        **patch_processors(config),
        tokenizer=tiny_tokenizer(TOKENS, NAMES),
        chat_template=chatml(*MARKS, system="You are a helpful assistant."),
    )


# ------------------------------------------------------------------------------------------------------ family

QWEN2_VL = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    vision_tower="model.visual",
    projector="model.visual.merger",
    tower=MERGING,
    image_layouts=image_layouts,
    video_layouts=video_layouts,
    positions="mrope",
    tiny=Tiny(tiny_config, tiny_pixels, tiny_run, tuple(SIZES), token_types, ((), (True,)), tiny_processor),
)
