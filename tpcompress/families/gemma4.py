"""Gemma 4: images and frames of any size; large models have bidirectional vision tokens in sliding layers only.

Small models have additional per-layer inputs, and late layers reuse the keys of earlier ones. Gemma 4 Unified has no
vision tower: the projector reads pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from tpcompress.families.base import Blocks, Family, Tiny
from tpcompress.families.counts import unmerged
from tpcompress.families.gemma3 import number_runs
from tpcompress.families.layout import Grid, Layout
from tpcompress.families.tiny import END, IMAGE, START, VIDEO, tiny_text
from tpcompress.families.tiny_processor import image_processor, tiny_tokenizer, turns


def patches_per_side(config: Any) -> int:
    """Side of the square of patches that becomes one token."""
    vision = config.vision_config
    return 1 if vision.model_type == "gemma4_unified_vision" else int(vision.pooling_kernel_size)


def grids(config: Any, places: Tensor) -> list[Grid]:
    """One grid per image or frame.

    Args:
        config: config of the model.
        places: int (images, patches, 2): positions (x, y) of the patches; -1 on padding.
    """
    sizes = (places.amax(1) + 1) // patches_per_side(config)
    return [Grid(rows, cols) for cols, rows in sizes.tolist()]


def image_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One token per square of patches."""
    return [Layout((grid,)) for grid in grids(config, inputs["image_position_ids"])]


def video_layouts(config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Layout]:
    """One grid per frame; time stamps separate the frames."""
    frames = iter(grids(config, inputs["video_position_ids"]))
    return [
        Layout(tuple(next(frames) for _ in range(count)), video=True)
        for count in inputs["num_frames_per_video"].tolist()
    ]


def vision_blocks(config: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Every run of image or video tokens is a block, if enabled in the config."""
    types = arguments.get("mm_token_type_ids")
    both_ways = config.get_text_config().use_bidirectional_attention == "vision"
    return None if types is None or not both_ways else number_runs((types == 1) | (types == 2))


def keys_of(config: Any, layer: int) -> int:
    """The last layers reuse keys and values of the preceding last layer of the same type."""
    text = config.get_text_config()
    first = text.num_hidden_layers - text.num_kv_shared_layers
    if layer < first:
        return layer
    return max(i for i in range(first) if text.layer_types[i] == text.layer_types[layer])


def refuse(config: Any) -> str | None:
    """Refuse encoders that are built from a decoder, and models without a vision tower."""
    if config.vision_config is None:
        return "it has no vision tower; a config with vision_config is required."
    if config.get_text_config().use_bidirectional_attention == "all":
        return "its text attention is bidirectional; use_bidirectional_attention 'vision' and None are supported."
    return None


# ------------------------------------------------------------------------------------------------ test fixture

SIZES = {"image": (6, 8), "wide": (4, 11), "video": (4, 5)}
"""Rows and columns of tokens by kind."""

FRAMES = 3
"""Frames per video."""


def tiny_config(size: str = "small") -> PretrainedConfig:
    """3 x 3 patches per token, windows of 48.

    `small`: per-layer inputs, layers 4 and 5 reuse the keys of 3 and 2. `large`: blocks of vision tokens, experts,
    keys equal to values in layers 2 and 5.
    """
    sliding, full = "sliding_attention", "full_attention"
    more: dict[str, Any] = {
        "head_dim": 16, "global_head_dim": 32, "sliding_window": 48,
        "layer_types": [sliding, sliding, full, sliding, sliding, full],
    }  # fmt: skip
    if size == "small":
        more |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 2}
        more |= {"use_double_wide_mlp": True}
    else:
        more |= {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision", "attention_k_eq_v": True}
        more |= {"num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        more |= {"moe_intermediate_size": 32}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16, "patch_size": 2, "position_embedding_size": 64,
    }  # fmt: skip
    text = tiny_text("gemma4_text", **more)
    return AutoConfig.for_model("gemma4", text_config=text, vision_config=vision, **tiny_ids())


def tiny_ids() -> dict[str, Any]:
    """Config entries with the ids of placeholders, start and end."""
    return {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "audio_token_id": 106, "boi_token_id": START,
        "eoi_token_id": END,
    }  # fmt: skip


def tiny_unified() -> PretrainedConfig:
    """6 x 6 pixels per token, windows of 48, blocks of vision tokens."""
    text = tiny_text("gemma4_unified_text", head_dim=16, global_head_dim=32, sliding_window=48)
    text["layer_types"] = ["sliding_attention", "full_attention"] * 3
    vision = {"patch_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 64, "output_proj_dims": 32}
    return AutoConfig.for_model("gemma4_unified", text_config=text, vision_config=vision, **tiny_ids())


def tiny_run(config: Any, kind: str) -> list[int]:
    """Placeholders between start and end; a time stamp before every frame."""
    rows, cols = SIZES[kind]
    if kind == "video":
        return [token for frame in range(FRAMES) for token in (3 + frame, START, *[VIDEO] * rows * cols, END)]
    return [START, *[IMAGE] * rows * cols, END]


def tiny_pixels(config: Any, samples: Sequence[Sequence[str]], generator: Any) -> dict[str, Any]:
    """Patches in [0, 1] of every image and frame, padded to the same number, with their positions (x, y)."""
    kinds = [kind for sample in samples for kind in sample]
    videos = kinds.count("video")
    inputs = patches(config, [SIZES[kind] for kind in kinds if kind != "video"], generator, "pixel_values", "image")
    if videos:
        inputs |= patches(config, [SIZES["video"]] * videos * FRAMES, generator, "pixel_values_videos", "video")
        inputs["num_frames_per_video"] = torch.full((videos,), FRAMES)
    return inputs


def patches(config: Any, sizes: Sequence[tuple[int, int]], generator: Any, name: str, modality: str) -> dict[str, Any]:
    """Processor outputs for images with the given (rows, columns) of tokens."""
    if not sizes:
        return {}
    vision, step = config.vision_config, patches_per_side(config)
    depth = 3 * (vision.patch_size * vision.pooling_kernel_size // step) ** 2
    most = max(rows * cols for rows, cols in sizes) * step**2
    pixels, places = torch.zeros(len(sizes), most, depth), torch.full((len(sizes), most, 2), -1)
    for i, (rows, cols) in enumerate(sizes):
        grid = torch.cartesian_prod(torch.arange(rows * step), torch.arange(cols * step)).flip(1)
        places[i, : len(grid)] = grid
        pixels[i, : len(grid)] = torch.rand(len(grid), depth, generator=generator)
    return {name: pixels, f"{modality}_position_ids": places}


def token_types(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """1 on image tokens, 2 on video tokens."""
    return {"mm_token_type_ids": (input_ids == IMAGE) + 2 * (input_ids == VIDEO)}


TOKENS = {
    0: "<pad>", 1: "<bos>", 2: "<eos>", IMAGE: "<|image|>", VIDEO: "<|video|>", START: "<|image>", END: "<image|>",
    106: "<|audio|>", 107: "<|audio>", 108: "<audio|>", 109: "<|turn>", 110: "<turn|>",
}  # fmt: skip

NAMES = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
    "boa_token": "<|audio>", "eoa_token": "<audio|>",
}  # fmt: skip


def tiny_processor(config: Any) -> Any:
    """At most 70 tokens per image and frame, which is the least that the processors accept."""
    import transformers

    name, vision = "Gemma4Unified" if config.model_type == "gemma4_unified" else "Gemma4", config.vision_config
    sizes = {"patch_size": vision.patch_size, "max_soft_tokens": 70, "pooling_kernel_size": vision.pooling_kernel_size}
    names = {"system": "system", "user": "user", "assistant": "model"}
    images = f"{name}ImageProcessor"
    return getattr(transformers, f"{name}Processor")(
        getattr(transformers, f"{name}AudioFeatureExtractor")(),
        # The unified processor is on torchvision only.
        image_processor(images, **sizes) if name == "Gemma4" else getattr(transformers, images)(**sizes),
        tiny_tokenizer(TOKENS, NAMES, bos=True),
        getattr(transformers, f"{name}VideoProcessor")(**sizes, num_frames=3),
        chat_template=turns(
            {role: (f"<|turn>{name}\n", "<turn|>\n") for role, name in names.items()}, "<|turn>model\n",
            "\n\n<|image|>\n\n", "\n\n<|video|>\n\n", start="<bos>",
        ),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ family

GEMMA4 = Family(
    name="gemma4",
    model_types=("gemma4",),
    vision_tower="model.vision_tower",
    projector="model.embed_vision",
    image_layouts=image_layouts,
    video_layouts=video_layouts,
    masks_in_core=True,
    blocks=Blocks(vision_blocks, kinds=("sliding_attention",)),
    keys_of=keys_of,
    refuse=refuse,
    limits=("Audio tokens are never dropped.",),
    tiny=Tiny(tiny_config, tiny_pixels, tiny_run, tuple(SIZES), token_types, (("small",), ("large",)), tiny_processor),
)

GEMMA4_UNIFIED = replace(
    GEMMA4,
    name="gemma4_unified",
    model_types=("gemma4_unified",),
    vision_tower="model.embed_vision",
    projector="model.embed_vision.multimodal_embedder",
    blocks=Blocks(vision_blocks, beyond_window=True),
    patches_per_token=unmerged,
    tiny=Tiny(tiny_unified, tiny_pixels, tiny_run, tuple(SIZES), token_types, processor=tiny_processor),
)
