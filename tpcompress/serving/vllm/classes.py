"""The registered classes by name, made when vLLM looks one up."""

from __future__ import annotations

from typing import Any

from tpcompress.serving.vllm.adapter import list_adapters


def __getattr__(name: str) -> Any:
    if name.startswith("TPCompress"):
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

        from tpcompress.serving.vllm.registration import model_class

        for model_type in list_adapters():
            if name == f"TPCompress{MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]}":
                return model_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
