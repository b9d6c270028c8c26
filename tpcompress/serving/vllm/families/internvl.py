"""InternVL in vLLM: tiles of one image share a budget, every frame of a video has its own."""

from __future__ import annotations

from typing import Any

from tpcompress.families import Layout, family_of
from tpcompress.serving.vllm.adapter import Adapter, Fields


def layouts(config: Any, modality: str, fields: Fields, placeholders: int) -> list[Layout]:
    """One layout of all tiles of an image, as no text stands between them; one per frame of a video."""
    pieces = int(fields[f"{modality}_num_patches"].reshape(-1)[0])
    found = family_of(config).image_layouts(config, fields, [placeholders // pieces] * pieces)
    return found if modality == "video" else [Layout(tuple(grid for layout in found for grid in layout.grids))]


ADAPTER = Adapter(
    module="vllm.model_executor.models.interns1",
    model="InternS1ForConditionalGeneration",
    processor="InternS1MultiModalProcessor",
    info="InternS1ProcessingInfo",
    dummy="InternS1DummyInputsBuilder",
    modalities=("image", "video"),
    fields=("image_num_patches", "video_num_patches"),
    layouts=layouts,
)
