"""LLaVA 1.5 in vLLM."""

from tpcompress.serving.vllm.adapter import CLIP_NAMES, Adapter

ADAPTER = Adapter(
    module="vllm.model_executor.models.llava",
    model="LlavaForConditionalGeneration",
    processor="LlavaMultiModalProcessor",
    info="LlavaProcessingInfo",
    dummy="LlavaDummyInputsBuilder",
    fields=("pixel_values",),
    rename=CLIP_NAMES,
)
