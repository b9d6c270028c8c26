"""What the plug-in must know of a family in vLLM; one file per model type in `families/`, importable without vLLM."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from tpcompress.export.runtimes.vllm import served_types
from tpcompress.families import Layout, family_of

Fields = Mapping[str, Tensor]
"""Processor outputs of one image or video by name, with a first dimension of 1."""

ItemLayouts = Callable[[Any, str, Fields, int], list[Layout]]
"""(config, modality, fields, placeholders) -> the layouts of one image or video: one per budget."""

GridPositions = Callable[[Any, str, Fields], Tensor]
"""(config, modality, fields) -> positions of an item's placeholders relative to its first, int64 (3, placeholders)."""


def of_family(config: Any, modality: str, fields: Fields, placeholders: int) -> list[Layout]:
    """The layout that the family itself gives the item."""
    layouts = family_of(config).layouts(modality)
    assert layouts is not None
    return layouts(config, fields, [placeholders])


@dataclass(frozen=True)
class Adapter:
    """One model type in vLLM.

    Attributes:
        module: vLLM's module with the classes below.
        model, processor, info, dummy: names of the model, its multimodal processor, its processing info and its builder
            of dummy inputs.
        modalities: those that are served.
        fields: names of processor outputs that `layouts` and `positions` read.
        layouts: see `ItemLayouts`.
        positions: see `GridPositions`; None in models with one position per token.
        rename: prefixes of weights in the export that vLLM's class has under another name.
    """

    module: str
    model: str
    processor: str
    info: str
    dummy: str
    modalities: tuple[str, ...] = ("image",)
    fields: tuple[str, ...] = ()
    layouts: ItemLayouts = of_family
    positions: GridPositions | None = None
    rename: Mapping[str, str] = field(default_factory=dict)

    def load(self, name: str) -> Any:
        """A class of vLLM by the name that an attribute holds."""
        return getattr(importlib.import_module(self.module), getattr(self, name))


CLIP_NAMES = {f"{head}vision_tower.": f"{head}vision_tower.vision_model." for head in ("", "model.")}
"""Weights of CLIP and SigLIP towers, which transformers 5 saves without `vision_model.`"""


@cache
def list_adapters() -> dict[str, Adapter]:
    """All adapters by model type: the constant `ADAPTER` of each file of `families/`."""
    package = f"{__package__}.families"
    return {name: importlib.import_module(f"{package}.{name}").ADAPTER for name in served_types()}


def adapter_of(config: Any) -> Adapter:
    """The adapter of an exported config.

    Raises:
        KeyError: its model type is not served.
    """
    return list_adapters()[config.base_model_type]
