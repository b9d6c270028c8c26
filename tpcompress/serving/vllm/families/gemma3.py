"""Gemma 3 in vLLM."""

from __future__ import annotations

from typing import Any

from tpcompress.families import Layout, family_of
from tpcompress.serving.vllm.adapter import CLIP_NAMES, Adapter, Fields


def layouts(config: Any, modality: str, fields: Fields, placeholders: int) -> list[Layout]:
    """One layout for the image and one for each of its crops (pan and scan)."""
    pieces = int(fields["num_patches"].reshape(-1)[0])
    return family_of(config).image_layouts(config, fields, [placeholders // pieces] * pieces)


ADAPTER = Adapter(
    module="vllm.model_executor.models.gemma3_mm",
    model="Gemma3ForConditionalGeneration",
    processor="Gemma3MultiModalProcessor",
    info="Gemma3ProcessingInfo",
    dummy="Gemma3DummyInputsBuilder",
    fields=("num_patches",),
    layouts=layouts,
    rename=CLIP_NAMES,
)
