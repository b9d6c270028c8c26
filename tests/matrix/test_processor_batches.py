"""Batches of the real processors, as they come: images of several sizes and tiles, two per row, text rows, videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from exact import tolerance
from PIL import Image
from structure import first_variants
from support import family_folder, generate, logit_gap
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

import tpcompress as tp
from tpcompress.insertion.effect import effect_of
from tpcompress.insertion.plan import PruningPlan

SIZES = [(40, 64), (60, 30), (50, 50)]
PLAN = PruningPlan.of("divprune:0.5@0,uniform:0.25@2")
LISTED = ("gemma3", "gemma4", "gemma4_unified", "idefics2", "idefics3", "lfm2_vl", "smolvlm")
"""Families whose processors take one list of images per row, also of a row without any."""
VIDEO = (
    "ernie4_5_vl_moe", "gemma4", "glm4v", "internvl", "llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen2_vl",
    "qwen3_5", "qwen3_vl", "smolvlm", "video_llava",
)  # fmt: skip


def families(names: Sequence[str], quick: str) -> list[Any]:
    return [pytest.param(name, marks=() if name == quick else pytest.mark.slow) for name in names]


@cache
def loaded(family: str) -> tuple[Any, Any]:
    folder = family_folder(family)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return model, processor


def prompts(processor: Any, rows: Sequence[tuple[int, str, int]]) -> list[str]:
    """Prompts with a number of images or videos, and more words."""
    content = [
        [{"type": kind}] * count + [{"type": "text", "text": "what is this" + " word" * words}]
        for count, kind, words in rows
    ]
    turns = [[{"role": "user", "content": each}] for each in content]
    if not getattr(processor, "chat_template", None):  # PaliGemma
        return [processor.image_token * count + "what is this" + " word" * words for count, _, words in rows]
    return [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]


def with_images(family: str, *rows: tuple[int, int]) -> dict[str, Tensor]:
    _, processor = loaded(family)
    rng = np.random.default_rng(0)

    def image(number: int) -> Image.Image:
        return Image.fromarray(rng.integers(1, 255, (*SIZES[number % 3], 3)).astype("uint8"))

    images: Any = [[image(row + number) for number in range(count)] for row, (count, _) in enumerate(rows)]
    if family not in LISTED:
        images = [one for row in images for one in row]
    text = prompts(processor, [(count, "image", words) for count, words in rows])
    return dict(processor(images=images, text=text, return_tensors="pt", padding=True))


def with_videos(family: str) -> dict[str, Tensor]:
    _, processor = loaded(family)
    rng = np.random.default_rng(0)
    videos = [rng.integers(1, 255, (4, 48, 64, 3)).astype("uint8") for _ in range(2)]
    times = [VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3], duration=2.0) for _ in videos]
    batch = processor(
        videos=videos, text=prompts(processor, [(1, "video", 0), (1, "video", 5)]), return_tensors="pt", padding=True,
        video_metadata=times, do_sample_frames=False,
    )  # fmt: skip
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}


def check(family: str, inputs: dict[str, Tensor], plan: PruningPlan = PLAN) -> Any:
    """Counts are as counted before, decoding continues the prefill, and hiding equals dropping where tokens hide."""
    model, _ = loaded(family)
    counted = effect_of(model, inputs, plan)
    tp.attach(model, plan)
    try:
        with tp.record(model) as trace:
            out = generate(model, inputs, new=3)
        try:
            whole = generate(model, inputs, new=3, use_cache=False)
        except (RuntimeError, IndexError, ValueError):  # ERNIE needs its cache, also without a plan
            assert family == "ernie4_5_vl_moe"
        else:
            assert logit_gap(out, whole) < 10 * tolerance(model)
        assert [tuple(stage.vision_out) for stage in trace.stages[:2]] == list(counted.retained)
        assert trace.stages[1].sequence_out == max(counted.sequence(1))
        with torch.no_grad():
            dropped = model(**inputs).logits[:, -1]
            try:
                with tp.mode(model, "mask"):
                    assert (model(**inputs).logits[:, -1] - dropped).abs().max() < 10 * tolerance(model)
            except ValueError as error:
                assert "Mode mask cannot hide tokens from layers" in str(error)  # noqa: PT017  most families can
    finally:
        tp.detach(model)
    return counted


@pytest.mark.parametrize("family", families([name for name, _ in first_variants()], "qwen2_5_vl"))
def test_images(family: str) -> None:
    counted = check(family, with_images(family, (2, 0), (1, 5), (1, 2)))
    assert len(counted.images) == 4
    assert counted.owners == (0, 0, 1, 2)
    one = check(family, with_images(family, (1, 0)))
    assert len(one.images) == 1


@pytest.mark.parametrize("family", families([name for name, _ in first_variants()], "llava_onevision"))
def test_a_row_of_text_beside_one_with_an_image(family: str) -> None:
    counted = check(family, with_images(family, (1, 0), (0, 4)))
    assert counted.owners == (0,)
    assert counted.sequence(1)[1] == counted.lengths[1]


@pytest.mark.parametrize("family", families(VIDEO, "smolvlm"))
def test_videos(family: str) -> None:
    inputs = with_videos(family)
    for scope in ("image", "tile", "prompt"):
        counted = check(family, inputs, replace(PLAN, scope=scope))
        # InternVL and SmolVLM read the frames of a video as images.
        assert len(counted.images) == (8 if family in ("internvl", "smolvlm") else 2)
        if scope == "tile":
            assert len(counted.totals) > 2
        if scope == "prompt":
            assert len(counted.totals) == 2
