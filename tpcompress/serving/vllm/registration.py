"""Registers the exported classes with vLLM, and refuses at load what cannot be served."""

from __future__ import annotations

from functools import cache
from typing import Any

from tpcompress.export.model import stored_plan
from tpcompress.export.runtimes import list_runtimes
from tpcompress.families import family_of
from tpcompress.serving.vllm.adapter import list_adapters

ONE_POSITION = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
"""Marks a model with one position per token as one whose positions its class sets; the language model has its own."""


def register_adapters() -> None:
    """Register a class for every served model type, by name: vLLM imports it when it is used."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Check(VerifyAndUpdateConfig):
        """Called when the engine's config is made, before any worker starts."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            check_model(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_engine(vllm_config)

    for model_type in list_adapters():
        name = f"TPCompress{MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]}"
        ModelRegistry.register_model(name, f"tpcompress.serving.vllm.classes:{name}")
        MODELS_CONFIG_MAP[name] = Check


def check_model(model_config: Any) -> None:
    """Refuse an export that cannot be served, and prepare its config for original positions.

    Raises:
        ValueError: why, and what would fit.
    """
    from vllm.platforms import current_platform

    config, multimodal = model_config.hf_config, model_config.multimodal_config
    plan = stored_plan(config, allow_outside=False)
    reason = list_runtimes()["vllm"].refuses(plan, config)
    if reason is not None:
        raise ValueError(
            f"vLLM cannot serve {model_config.model}: {reason}. Serve it with transformers, or export a plan of one "
            f"stage before the language model whose counts follow from the image, such as divprune:0.25@0."
        )
    if multimodal is not None and multimodal.video_pruning_rate:
        raise ValueError("The export has its own pruner; leave --video-pruning-rate out.")
    if multimodal is not None and multimodal.enable_mm_embeds:
        raise ValueError("The export prunes what its encoder makes; leave --enable-mm-embeds out.")
    family = family_of(config)
    if plan.positions == "original" and family.positions == "1d":
        config.rope_parameters = dict(ONE_POSITION)
    if family.blocks is not None:  # vLLM knows it by stock model types
        if current_platform.is_cpu():
            raise ValueError(
                f"Image tokens of {family.name} attend to each other in both directions, which vLLM's CPU backend "
                f"ignores; serve it on a GPU, or with transformers."
            )
        config.is_mm_prefix_lm = True
        model_config.model_arch_config = model_config.get_model_arch_config()


def check_engine(config: Any) -> None:
    """Refuse settings of the engine under which original positions would be lost.

    Raises:
        ValueError: which, and what would fit.
    """
    if stored_plan(config.model_config.hf_config, allow_outside=False).positions != "original":
        return
    if config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "Original positions of retained tokens are known on the first pipeline rank only; serve with "
            "--pipeline-parallel-size 1, or export with positions: compact."
        )
    speculative = config.speculative_config
    if speculative is not None:
        raise ValueError(
            f"Speculative decoding ({speculative.method}) is not supported with original positions; leave "
            f"--speculative-config out, or export with positions: compact."
        )


@cache
def model_class(model_type: str) -> type[Any]:
    """vLLM's class of a stock model type with the plan's pruner, registered with its multimodal processor."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from tpcompress.serving.vllm.model import PrunedModel
    from tpcompress.serving.vllm.processor import PrunedInfo, PrunedProcessor

    adapter = list_adapters()[model_type]
    stock, info, processor = adapter.load("model"), adapter.load("info"), adapter.load("processor")
    register = MULTIMODAL_REGISTRY.register_processor(
        type(f"TPCompress{processor.__name__}", (PrunedProcessor, processor), {}),
        info=type(f"TPCompress{info.__name__}", (PrunedInfo, info), {}),
        dummy_inputs=adapter.load("dummy"),
    )
    made: type[Any] = register(type(f"TPCompress{stock.__name__}", (PrunedModel, stock), {}))
    return made
