"""Qwen3-VL in vLLM, images only: in a video text stands between the frames, and which frame keeps how many tokens is
known after the encoder only."""

from tpcompress.serving.vllm.adapter import Adapter
from tpcompress.serving.vllm.families.qwen2_5_vl import grid_positions

ADAPTER = Adapter(
    module="vllm.model_executor.models.qwen3_vl",
    model="Qwen3VLForConditionalGeneration",
    processor="Qwen3VLMultiModalProcessor",
    info="Qwen3VLProcessingInfo",
    dummy="Qwen3VLDummyInputsBuilder",
    fields=("image_grid_thw",),
    positions=grid_positions,
)
