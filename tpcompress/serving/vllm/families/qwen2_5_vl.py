"""Qwen2.5-VL in vLLM: positions in time, height and width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.serving.vllm.adapter import Adapter, Fields


def grid_positions(config: Any, modality: str, fields: Fields) -> Tensor:
    """Time, row and column of every token; the time of video frames is in seconds times `tokens_per_second`."""
    merge = config.vision_config.spatial_merge_size
    frames, rows, cols = fields[f"{modality}_grid_thw"][0].tolist()
    axes = (torch.arange(frames), torch.arange(rows // merge), torch.arange(cols // merge))
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    if modality == "video":
        seconds = float(fields["second_per_grid_ts"][0]) if "second_per_grid_ts" in fields else 1.0
        grid[0] = (grid[0] * (seconds * getattr(config.vision_config, "tokens_per_second", 1.0))).long()
    return grid.flatten(1)


ADAPTER = Adapter(
    module="vllm.model_executor.models.qwen2_5_vl",
    model="Qwen2_5_VLForConditionalGeneration",
    processor="Qwen2_5_VLMultiModalProcessor",
    info="Qwen2_5_VLProcessingInfo",
    dummy="Qwen2_5_VLDummyInputsBuilder",
    modalities=("image", "video"),
    fields=("image_grid_thw", "video_grid_thw", "second_per_grid_ts"),
    positions=grid_positions,
)
