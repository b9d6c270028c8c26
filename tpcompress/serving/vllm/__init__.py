"""vLLM plug-in: `vllm serve DIR` on an exported folder (entry point `vllm.general_plugins`)."""

from __future__ import annotations


def register() -> None:
    """Register exported model types with vLLM. vLLM calls it in every process, before a config is read."""
    from tpcompress.auto_register import register_on_demand
    from tpcompress.serving.vllm.registration import register_adapters

    register_on_demand()
    register_adapters()
