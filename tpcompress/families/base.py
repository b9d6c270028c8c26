"""The declarative description of a model family (`Family`), and its resolution to the modules of a model (`Parts`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tpcompress.errors import did_you_mean
from tpcompress.families.counts import fixed_tokens, square_of_patches
from tpcompress.families.layout import Layout
from tpcompress.families.packages import of_processor
from tpcompress.families.refused import check_not_refused
from tpcompress.families.tiny import Tiny
from tpcompress.open_set import modules_in

Layouts = Callable[[Any, Mapping[str, Any], Sequence[int]], list[Layout]]
"""(config, encoder arguments by name, token count of each encoder feature) -> one layout per image or video."""

ToTokens = Callable[[Any, str, Mapping[str, Any], Tensor], Sequence[Tensor]]
"""See `Tower.to_tokens`."""

MODALITIES = ("image", "video")


@dataclass(frozen=True)
class Blocks:
    """Blocks of tokens with bidirectional attention.

    Attributes:
        ids: (config, core model arguments by name) -> int (B, S): tokens with equal numbers >= 0 attend to each other;
            None if there are no blocks.
        kinds: layer types with bidirectional blocks, as in `config.layer_types`.
        beyond_window: a sliding window does not limit attention within a block.
    """

    ids: Callable[[Any, Mapping[str, Any]], Tensor | None]
    kinds: tuple[str, ...] = ("full_attention", "sliding_attention")
    beyond_window: bool = False


@dataclass(frozen=True)
class Tiles:
    """How the tiles of one image are told from other images in the prompt, where tiles are features of their own.

    One of the two fields is set. Tiles that no other token separates (`gap=0`) need no token ids.

    Attributes:
        gap: tiles with at most this many tokens between them belong to one image.
        closes: the token before the last tile of an image (its overview) stands before no other tile; so the token
            before the last tile of a sequence tells which tiles end an image.
    """

    gap: int | None = None
    closes: bool = False

    @property
    def apart(self) -> bool:
        """Whether text tokens separate the tiles of an image."""
        return self.gap != 0


def supported(config: Any) -> str | None:
    """Every variant is supported. A named function, because attached models can be pickled."""
    return None


def own_keys(config: Any, layer: int) -> int:
    """Every layer attends to its own keys and values."""
    return layer


def rotary_only(config: Any) -> bool:
    """Layers read positions only through the rotary embedding."""
    return False


def one_image(config: Any) -> int:
    """A vision token holds pixels of one image."""
    return 1


@dataclass(frozen=True)
class Tower:
    """Access to the layers of a vision tower, and the mapping from its patches to vision tokens.

    Attributes:
        layers: dotted path of the layers, relative to the tower.
        attention: name of the attention module of a layer.
        to_tokens: (core model, modality, encoder arguments by name, values (T, P, C) of the patches of T images, tiles
            or frames, or (1, all patches, C)) -> values (placeholders, C) of each encoder feature, weighted as the
            model weights patches; values at separators are arbitrary.
        has_class: (config) -> whether a class token precedes the patches.
        refuse: (config) -> reason why the mapping is undefined for a variant, or None.
        projected: the same mapping for rows of the projector's input; None if a row is not one vision token.
        pixels: the same mapping for the pixels of patches, with values of any width; None if it equals `to_tokens`.
        images: (config) -> consecutive images of a video that one vision token holds; `pixels` lists them in order.
    """

    layers: str
    attention: str
    to_tokens: ToTokens
    has_class: Callable[[Any], bool]
    refuse: Callable[[Any], str | None] = supported
    projected: ToTokens | None = None
    pixels: ToTokens | None = None
    images: Callable[[Any], int] = one_image


@dataclass(frozen=True)
class Family:
    """Description of a model family. Paths are dotted names from the outermost model.

    Attributes:
        name: name in tables and errors.
        model_types: values of `config.model_type` of the family.
        vision_tower, projector: paths of vision tower and projector; the projector is the merger if the tower has one.
        tower: access to the tower's layers for pruners; None if patches cannot be mapped to vision tokens.
        towers: the same for towers whose layers have other names: (`vision_config.model_type`, access) pairs.
        image_layouts: layouts of the images of one call of `core.get_image_features`.
        tiny: test fixture: a tiny model and its inputs.
        core: path of the model that merges vision tokens into the sequence.
        language_model, layers: paths of the text model and its decoder layers.
        final_norm: name of the language model's last norm.
        image_token, video_token: config attributes with the placeholder ids in `input_ids`.
        video_layouts: the same as `image_layouts` for `core.get_video_features`; None if videos are not supported.
        positions: `1d`, or `mrope` for positions in time, height and width.
        masks_in_core: the core model builds attention masks before it calls the text model.
        blocks: blocks of tokens with bidirectional attention; None if attention is causal.
        tiles: how features that are tiles of one image are found; None if every feature is an image.
        splits_tiles: every grid of a feature is a tile of its own, because one feature holds all images of a sample.
        keys_of: (config, layer) -> the layer whose keys and values a layer attends to.
        reads_positions: (config) -> whether layers read position ids in addition to the rotary embedding.
        patches_per_token: (config) -> patches of the vision encoder that become one vision token, or None where a
            resampler makes a fixed count.
        refuse: (config) -> reason why a variant is not supported, or None.
        limits: known limitations, one sentence each.
        one_size: the processor resizes every image to one size.
        packages: packages that the processor needs besides those of `packages.of_processor`.
        takes: what the processor takes besides one question about one image: rows without an image (`text`), several
            `images`, several `turns`.
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
    towers: tuple[tuple[str, Tower], ...] = ()
    blocks: Blocks | None = None
    tiles: Tiles | None = None
    splits_tiles: bool = False
    keys_of: Callable[[Any, int], int] = own_keys
    reads_positions: Callable[[Any], bool] = rotary_only
    patches_per_token: Callable[[Any], int | None] = square_of_patches
    refuse: Callable[[Any], str | None] = supported
    limits: tuple[str, ...] = ()
    one_size: bool = False
    packages: tuple[str, ...] = ()
    takes: tuple[str, ...] = ("text", "images", "turns")

    @property
    def requires(self) -> tuple[str, ...]:
        """Packages outside the core that the processor needs."""
        return tuple(dict.fromkeys((*of_processor(self.model_types), *self.packages)))

    def layouts(self, modality: str) -> Layouts | None:
        """The layout function of images or videos; None if the modality is not supported."""
        return self.image_layouts if modality == "image" else self.video_layouts

    def fitted(self, config: Any) -> Family:
        """The family with the tower that a config has."""
        tower = dict(self.towers).get(getattr(getattr(config, "vision_config", None), "model_type", ""))
        return self if tower is None else replace(self, tower=tower)

    def tokens_per_image(self, config: Any) -> int | None:
        """Vision tokens of an image if the family resizes all images to one size, else None."""
        return fixed_tokens(config) if self.one_size else None


@dataclass(frozen=True)
class Parts:
    """The modules of one model that a family describes.

    Attributes:
        placeholder_ids: placeholder id by modality (`image`, `video`).
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
        """The norm after the last decoder layer."""
        return self.language_model.get_submodule(self.family.final_norm)

    @property
    def stage_layers(self) -> list[int]:
        """Layers at which a stage can act: no later layer attends to keys of an earlier one, which has more tokens."""
        keys = [self.family.keys_of(self.text_config, layer) for layer in range(len(self.layers))]
        return [layer for layer in range(len(keys)) if layer == 0 or min(keys[layer:]) >= layer]

    @property
    def hidden_size(self) -> int:
        """Width of the language model."""
        return int(self.text_config.hidden_size)


@cache
def list_families() -> dict[str, Family]:
    """All families of this folder by name."""
    modules = modules_in("tpcompress.families")
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Family)]
    return {family.name: family for family in sorted(found, key=lambda family: family.name)}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model config.

    Raises:
        ValueError: `config.model_type` is unknown or refused, or its variant is not supported; with the reason.
    """
    model_type = getattr(config, "base_model_type", None) or config.model_type
    for family in list_families().values():
        if model_type in family.model_types:
            reason = family.refuse(config)
            if reason:
                raise ValueError(f"{family.name} cannot be pruned here: {reason}")
            return family.fitted(config)
    check_not_refused(model_type)
    known = sorted(t for family in list_families().values() for t in family.model_types)
    hint = did_you_mean(model_type, known)
    raise ValueError(
        f"'{model_type}' is not a known family (known: {', '.join(known)}).{hint} "
        f"Add tpcompress/families/{model_type}.py; see 'Adding a model family' in the documentation."
    )


def resolve(model: PreTrainedModel) -> Parts:
    """Find the modules of a model.

    Raises:
        ValueError: the family of the model is unknown, refused or not supported.
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
