"""WHERE the vision tokens of a given MLLM are: one declarative `Family` per file, resolved to `Parts` of a model."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ImageTokens:
    """Vision tokens that each image of a call brings, known to the host from shapes alone.

    Attributes:
        counts: tokens of each image, in the order of their placeholders.
        grids: (rows, columns) of each image; (1, count) where its tokens are no grid.
    """

    counts: list[int]
    grids: list[tuple[int, int]]


def supported(config: Any) -> str | None:
    """Nothing to refuse. A function with a name, because a model with a plan attached can be pickled."""
    return None


@dataclass(frozen=True)
class Family:
    """What tpcompress must know of a model family. Paths are dotted names from the outermost model.

    Attributes:
        name: the word used in tables and errors.
        model_types: values of `config.model_type` that it covers.
        core: the model that merges vision tokens into the sequence.
        vision_tower, projector, language_model, layers: the parts, in the order of the tensor's life.
        placeholder: config attribute with the id that vision tokens have in `input_ids`.
        image_tokens: (config, forward arguments) -> `ImageTokens`, or None if the call brings no image.
        tiny_config: a random model of a few thousand parameters, for tests.
        refuse: (config) -> reason why a variant is not supported, or None.
    """

    name: str
    model_types: tuple[str, ...]
    core: str
    vision_tower: str
    projector: str
    language_model: str
    layers: str
    placeholder: str
    image_tokens: Callable[[Any, Mapping[str, Any]], ImageTokens | None]
    tiny_config: Callable[..., PretrainedConfig]
    refuse: Callable[[Any], str | None] = supported


@dataclass(frozen=True)
class Parts:
    """A family resolved on one model."""

    family: Family
    model: PreTrainedModel
    core: nn.Module
    vision_tower: nn.Module
    projector: nn.Module
    language_model: nn.Module
    layers: nn.ModuleList
    placeholder_id: int

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return int(self.model.config.get_text_config().hidden_size)


@cache
def list_families() -> dict[str, Family]:
    """Every family of this folder by name."""
    package = importlib.import_module("tpcompress.families")
    modules = [importlib.import_module(f"{package.__name__}.{i.name}") for i in pkgutil.iter_modules(package.__path__)]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Family)]
    return {family.name: family for family in sorted(found, key=lambda family: family.name)}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model config.

    Raises:
        ValueError: no family covers `config.model_type`, or its variant is not supported.
    """
    model_type = getattr(config, "base_model_type", None) or config.model_type
    for family in list_families().values():
        if model_type in family.model_types:
            reason = family.refuse(config)
            if reason:
                raise ValueError(f"{family.name} cannot be pruned here: {reason}")
            return family
    known = sorted(t for family in list_families().values() for t in family.model_types)
    near = difflib.get_close_matches(model_type, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"'{model_type}' is not a known family (known: {', '.join(known)}).{hint} "
        f"Add tpcompress/families/{model_type}.py; see README, 'A new model family'."
    )


def resolve(model: PreTrainedModel) -> Parts:
    """Find the parts of a model.

    Raises:
        ValueError: the model is of no known family.
    """
    family = family_of(model.config)
    part = model.get_submodule
    layers = part(family.layers)
    assert isinstance(layers, nn.ModuleList)
    return Parts(
        family, model, part(family.core), part(family.vision_tower), part(family.projector),
        part(family.language_model), layers, int(getattr(model.config, family.placeholder)),
    )  # fmt: skip


def rotary_of(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The rotary function that an attention module itself calls: `apply_rotary_pos_emb(q, k, cos, sin)`."""
    return sys.modules[type(attention).__module__].apply_rotary_pos_emb
