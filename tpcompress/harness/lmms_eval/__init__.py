"""lmms-eval: `lmms-eval eval --model tpcompress --model_args pretrained=DIR`, found by the entry point `manifests`."""

from __future__ import annotations

from typing import Any

MODEL = "tpcompress"
"""Name of the model in lmms-eval."""


def manifests() -> list[Any]:
    """The models of this package, as the entry point group `lmms_eval.models` expects them."""
    from lmms_eval.models.registry_v2 import ModelManifest

    classes = f"{__name__}.model"
    return [
        ModelManifest(
            model_id=MODEL, chat_class_path=f"{classes}.TpcompressChat", simple_class_path=f"{classes}.TpcompressSimple"
        )
    ]
