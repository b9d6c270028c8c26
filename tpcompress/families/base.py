"""WHERE the vision tokens of a given MLLM are: one declarative `Family` per file, resolved to `Parts` of a model."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tpcompress.errors import did_you_mean
from tpcompress.families.counts import fixed_tokens, square_of_patches
from tpcompress.families.layout import Layout
from tpcompress.families.refused import check_not_refused

Layouts = Callable[[Any, Mapping[str, Any], Sequence[int]], list[Layout]]
"""(config, arguments of the encoder by name, tokens of each of its features) -> one layout per image or video."""

ToTokens = Callable[[Any, str, Mapping[str, Any], Tensor], Sequence[Tensor]]
"""See `Tower.to_tokens`."""

MODALITIES = ("image", "video")


@dataclass(frozen=True)
class Blocks:
    """Vision tokens that attend to each other in both directions.

    Attributes:
        ids: (config, arguments of the core model by name) -> int (B, S): equal numbers >= 0 see each other; None if
            nothing does.
        kinds: the kinds of layers that do so, as `config.layer_types` calls them.
        beyond_window: a sliding window does not cut a block.
    """

    ids: Callable[[Any, Mapping[str, Any]], Tensor | None]
    kinds: tuple[str, ...] = ("full_attention", "sliding_attention")
    beyond_window: bool = False


def supported(config: Any) -> str | None:
    """Nothing to refuse. A function with a name, because a model with a plan attached can be pickled."""
    return None


def own_keys(config: Any, layer: int) -> int:
    """Every layer computes its own keys."""
    return layer


def rotary_only(config: Any) -> bool:
    """Layers know positions from the rotary embedding alone."""
    return False


def no_arguments(config: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """Nothing beside ids, mask and pixels."""
    return {}


@dataclass(frozen=True)
class Tiny:
    """A random model of a few thousand parameters and inputs for it, for the tests that every family gets.

    Attributes:
        config: (any arguments) -> config of six decoder layers (or as few as the family allows), vocabulary 128, width
            64; words are ids 3 to 89.
        pixels: (config, kinds of pictures per sample, generator) -> what the processor makes of them, by name.
        ids: (config, kind) -> the run of ids that one picture has in the prompt, separators included.
        kinds: kinds of pictures: `image` always; `wide`, an image of another size, and `video` where there are any.
        arguments: (config, input ids (B, S)) -> further arguments that the processor derives from the ids.
        variants: positional arguments of `config` worth a run of all tests.
    """

    config: Callable[..., PretrainedConfig]
    pixels: Callable[[Any, Sequence[Sequence[str]], Any], dict[str, Any]]
    ids: Callable[[Any, str], list[int]]
    kinds: tuple[str, ...] = ("image",)
    arguments: Callable[[Any, Tensor], dict[str, Tensor]] = no_arguments
    variants: tuple[tuple[Any, ...], ...] = ((),)


@dataclass(frozen=True)
class Tower:
    """What layers of a vision tower show, and which vision tokens its patches become.

    Attributes:
        layers: dotted path of the layers, from the tower.
        attention: name of the attention of such a layer.
        to_tokens: (core model, modality, arguments of the encoder by name, values (T, P, C) of the patches of T
            images, tiles or frames, or of all patches behind each other with T = 1) -> values (placeholders, C) of
            each feature of the encoder, weighted as the model weighs patches; separators may hold anything.
        has_class: (config) -> whether a class token stands before the patches.
        refuse: (config) -> reason why patches cannot be told apart in a variant, or None.
        projected: the same for rows of the projector's input; None where no such row is one vision token.
        pixels: the same for the pixels of patches; None if they lie as in the layers.
    """

    layers: str
    attention: str
    to_tokens: ToTokens
    has_class: Callable[[Any], bool]
    refuse: Callable[[Any], str | None] = supported
    projected: ToTokens | None = None
    pixels: ToTokens | None = None


@dataclass(frozen=True)
class Family:
    """What tpcompress must know of a model family. Paths are dotted names from the outermost model.

    Attributes:
        name: the word used in tables and errors.
        model_types: values of `config.model_type` that it covers.
        vision_tower, projector: where they are; a tower that projects by itself names its merger.
        tower: what pruners may see of the tower's layers; None if its patches cannot be followed to vision tokens.
        image_layouts: layouts of the images of one call of `core.get_image_features`.
        tiny: a tiny model and its inputs.
        core: the model that merges vision tokens into the sequence.
        language_model, layers: the text model and its decoder layers.
        final_norm: name of the language model's last norm.
        image_token, video_token: config attributes with the ids that vision tokens have in `input_ids`.
        video_layouts: the same as `image_layouts` for `core.get_video_features`; None if the family has no videos.
        positions: `1d`, or `mrope` for rows of time, height and width.
        masks_in_core: the core model builds attention masks before it calls the text model.
        blocks: vision tokens see each other both ways.
        joins_tiles: features whose placeholders follow each other without a gap are tiles of one image.
        splits_tiles: every rectangle of a feature is an image of its own: text stands between them, and nothing tells
            which belong together.
        keys_of: (config, layer) -> the layer whose keys and values a layer attends to.
        reads_positions: (config) -> whether layers read position ids beside the rotary embedding.
        patches_per_token: (config) -> patches of the vision encoder that become one vision token, or None where a
            resampler makes a fixed count.
        refuse: (config) -> reason why a variant is not supported, or None.
        limits: what is known not to work, one sentence each.
    """

    name: str
    model_types: tuple[str, ...]
    vision_tower: str
    projector: str
    image_layouts: Layouts
    tiny: Tiny
    core: str = "model"
    language_model: str = "model.language_model"
    layers: str = "model.language_model.layers"
    final_norm: str = "norm"
    image_token: str = "image_token_id"
    video_token: str = "video_token_id"
    video_layouts: Layouts | None = None
    positions: str = "1d"
    masks_in_core: bool = False
    tower: Tower | None = None
    blocks: Blocks | None = None
    joins_tiles: bool = False
    splits_tiles: bool = False
    keys_of: Callable[[Any, int], int] = own_keys
    reads_positions: Callable[[Any], bool] = rotary_only
    patches_per_token: Callable[[Any], int | None] = square_of_patches
    refuse: Callable[[Any], str | None] = supported
    limits: tuple[str, ...] = ()

    def layouts(self, modality: str) -> Layouts | None:
        """The function that lays out images or videos; None if the family has none."""
        return self.image_layouts if modality == "image" else self.video_layouts

    def tokens_per_image(self, config: Any) -> int | None:
        """Vision tokens of an image if the family resizes all images to one size, else None."""
        return None if "wide" in self.tiny.kinds else fixed_tokens(config)


@dataclass(frozen=True)
class Parts:
    """A family resolved on one model.

    Attributes:
        placeholder_ids: the id of vision tokens by modality (`image`, `video`).
    """

    family: Family
    model: PreTrainedModel
    core: nn.Module
    vision_tower: nn.Module
    projector: nn.Module
    language_model: nn.Module
    layers: nn.ModuleList
    placeholder_ids: dict[str, int]

    @property
    def text_config(self) -> Any:
        """Config of the language model."""
        return self.model.config.get_text_config()

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last decoder layer."""
        return self.language_model.get_submodule(self.family.final_norm)

    @property
    def stage_layers(self) -> list[int]:
        """Layers before which a stage may act: none behind may read the keys of a layer that saw more."""
        keys = [self.family.keys_of(self.text_config, layer) for layer in range(len(self.layers))]
        return [layer for layer in range(len(keys)) if layer == 0 or min(keys[layer:]) >= layer]

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return int(self.text_config.hidden_size)


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
        ValueError: no family covers `config.model_type`, none can (with the reason), or its variant is not supported.
    """
    model_type = getattr(config, "base_model_type", None) or config.model_type
    for family in list_families().values():
        if model_type in family.model_types:
            reason = family.refuse(config)
            if reason:
                raise ValueError(f"{family.name} cannot be pruned here: {reason}")
            return family
    check_not_refused(model_type)
    known = sorted(t for family in list_families().values() for t in family.model_types)
    hint = did_you_mean(model_type, known)
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
    names = {"image": family.image_token, "video": family.video_token}
    ids = {m: int(getattr(model.config, names[m])) for m in MODALITIES if family.layouts(m) is not None}
    return Parts(
        family, model, part(family.core), part(family.vision_tower), part(family.projector),
        part(family.language_model), layers, ids,
    )  # fmt: skip
