"""LLaVA-OneVision in vLLM, which counts the tiles of an image as if it were the only one of its prompt."""

from tpcompress.serving.vllm.adapter import CLIP_NAMES, Adapter

ADAPTER = Adapter(
    module="vllm.model_executor.models.llava_onevision",
    model="LlavaOnevisionForConditionalGeneration",
    processor="LlavaOnevisionMultiModalProcessor",
    info="LlavaOnevisionProcessingInfo",
    dummy="LlavaOnevisionDummyInputsBuilder",
    modalities=("image", "video"),
    fields=("image_sizes", "pixel_values_videos"),
    rename=CLIP_NAMES,
)
