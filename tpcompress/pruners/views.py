"""What a pruner may read: the `TokenView`, and which of its optional fields belongs to which view.

A pruner lists the views that it reads in `needs`. A new view is one field here, which names its view, and one file in
`tpcompress/insertion/views/`, which fills it.

B rows (one per image, or one per prompt under `scope: prompt`), V vision tokens (padded), U vision tokens at the
language model's input (padded), D hidden size, S sequence length, H attention heads, Q text tokens of the prompt
(padded), L layers of the vision tower, C channels of the vision tower or of pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

SYSTEM, BETWEEN, INSTRUCTION = 1, 2, 3
"""Roles of the text tokens of a prompt: before a row's first vision token, among its vision tokens, after its last one.
Everything else has role 0: vision tokens, separators, padding, and answers."""

TOWER_LAYERS = (-2,)
"""The layer of a vision tower whose attention, keys and features most pruners read."""

PLACES = ("stage", "input", "layer_before", "layer_after", "tower_layer", "tower", "checkpoint")
"""Where a view is from: the stage itself, the language model's input, the decoder layer before or after the stage,
chosen layers of the vision tower, the vision tower as a whole, or weights that a checkpoint would have to hold."""


@dataclass(frozen=True)
class ViewSpec:
    """One view.

    Attributes:
        name: the word in a pruner's `needs`.
        at: where it is from, one of `PLACES`.
        prompt: whether it depends on the prompt.
    """

    name: str
    at: str
    prompt: bool = False

    def __post_init__(self) -> None:
        if self.at not in PLACES:
            raise ValueError(f"View '{self.name}' is at '{self.at}'; take one of {', '.join(PLACES)}.")


def view(*specs: ViewSpec) -> Any:
    """A field of `TokenView` that is filled if a pruner needs one of these views."""
    return field(default=None, metadata={"views": specs})


TEXT = ViewSpec("text", "stage", prompt=True)
NORMED = ViewSpec("normed", "stage")
INPUT = ViewSpec("input", "input", prompt=True)
KEYS = ViewSpec("keys", "layer_before")
VALUES = ViewSpec("values", "layer_before")
ATTENTION_PROMPT = ViewSpec("attention_prompt", "layer_before", prompt=True)
PROJECTOR = ViewSpec("projector", "tower")
PIXELS = ViewSpec("pixels", "tower")
JOINT = ViewSpec("joint", "checkpoint", prompt=True)
"""CLIP's joint embedding space, which no checkpoint of a multimodal model holds: it has no field."""


@dataclass(frozen=True)
class TokenView:
    """What a pruner may read. Optional fields are filled only if the pruner lists their view in `needs`.

    Only `vision_BVD`, `text_BSD` and `projector_BVC` carry a gradient. Padded entries of fields over V or U hold
    arbitrary tokens. A vision token that the model makes of several patches has the mean of their values, weighted as
    the model weighs them.

    Attributes:
        vision_BVD: hidden states of the vision tokens at the stage, in sequence order.
        valid_BV: False where a shorter row was padded.
        row_BV: grid row of each token in its image; the rectangles of a row, and its images, are stacked.
        col_BV: grid column of each token.
        tile_BV: rectangle of each token, counted in its row: the tile of an image, the frame of a video.
        image_BV: image or video of each token, counted in its row; 0 except under `scope: prompt`.
        canvas: (rows, columns) of the smallest grid that holds every row of the batch.
        video_BV: True on tokens of a video, whose rectangles are its frames; None if unknown.
        soft: the caller keeps the full length, so a pruner in training may return gates.
        text_BSD: hidden states of the whole sequence (needs "text").
        column_BV: int64, column of each vision token in `text_BSD` (needs "text").
        text_role_BS: int8, SYSTEM, BETWEEN, INSTRUCTION, or 0 where nothing may be read (needs "text").
        text_valid_BS: True on the instruction; on all text tokens of a prompt without instruction (needs "text").
        keys_BVD: keys in the layer before, after rotary embedding, heads concatenated (needs "keys").
        text_keys_BSD: the same for every position of the sequence (needs "keys").
        values_BVD: values in the layer before, heads concatenated (needs "values").
        text_values_BSD: the same for every position of the sequence (needs "values").
        normed_BVD: hidden states after the language model's final norm (needs "normed").
        text_normed_BSD: the same for every position of the sequence (needs "normed").
        attention_BHV: attention of the last prompt token to the vision tokens in the layer before, fp32, from the
            model's softmax over everything that the token attends to (needs "attention").
        attention_prompt_BHQV: the same for every text token of the prompt, 0 where the role is 0 (needs
            "attention_prompt").
        prompt_column_BQ: position of each of these text tokens in the sequence, as in `text_BSD` (needs
            "attention_prompt" or "input").
        prompt_role_BQ: their roles; 0 where a shorter prompt was padded.
        attention_last_vision_BHV: the same for the row's last vision token (needs "attention_last_vision").
        attention_next_BHV: attention of the last prompt token in the layer after the stage, computed as if nothing was
            dropped (needs "attention_next").
        input_vision_BUD: hidden states of all vision tokens at the language model's input, whatever earlier stages
            inside it dropped (needs "input").
        input_valid_BU: False where a shorter row of them was padded (needs "input").
        input_prompt_BQD: the same for the text tokens that `prompt_column_BQ` lists (needs "input").
        tower_cls_BLHV: attention of the class token to the patches in layers `tower_layers` of the vision tower, fp32
            (needs "tower_cls").
        tower_cls_query_BLHVD: query of the class token of each token's image or tile, head by head (needs
            "tower_cls_query").
        tower_received_BLHV: attention that patches receive there, mean over all queries of their attention window
            including the class token, fp32 (needs "tower_received").
        tower_keys_BLHVD: keys of these layers, head by head (needs "tower_keys").
        tower_features_BLVD: output of these layers, before the projector (needs "tower_features").
        projector_BVC: input of the projector for each token, where one of its rows is one token (needs "projector").
        project: the projector itself, token by token: (..., C) -> (..., D) (needs "projector").
        pixels_BVC: pixels of each token's patches, as the tower was given them (needs "pixels"): its `pixel_images`
            images one after the other, and in each the channels one after the other.
        pixel_images: consecutive images of a video that one vision token holds.
    """

    vision_BVD: Tensor
    valid_BV: Tensor
    row_BV: Tensor
    col_BV: Tensor
    tile_BV: Tensor
    image_BV: Tensor
    canvas: tuple[int, int]
    soft: bool = False
    video_BV: Tensor | None = None
    text_BSD: Tensor | None = view(TEXT)
    column_BV: Tensor | None = view(TEXT)
    text_role_BS: Tensor | None = view(TEXT)
    text_valid_BS: Tensor | None = view(TEXT)
    keys_BVD: Tensor | None = view(KEYS)
    text_keys_BSD: Tensor | None = view(KEYS)
    values_BVD: Tensor | None = view(VALUES)
    text_values_BSD: Tensor | None = view(VALUES)
    normed_BVD: Tensor | None = view(NORMED)
    text_normed_BSD: Tensor | None = view(NORMED)
    attention_BHV: Tensor | None = view(ViewSpec("attention", "layer_before", prompt=True))
    attention_prompt_BHQV: Tensor | None = view(ATTENTION_PROMPT)
    prompt_column_BQ: Tensor | None = view(ATTENTION_PROMPT, INPUT)
    prompt_role_BQ: Tensor | None = view(ATTENTION_PROMPT, INPUT)
    attention_last_vision_BHV: Tensor | None = view(ViewSpec("attention_last_vision", "layer_before"))
    attention_next_BHV: Tensor | None = view(ViewSpec("attention_next", "layer_after", prompt=True))
    input_vision_BUD: Tensor | None = view(INPUT)
    input_valid_BU: Tensor | None = view(INPUT)
    input_prompt_BQD: Tensor | None = view(INPUT)
    tower_cls_BLHV: Tensor | None = view(ViewSpec("tower_cls", "tower_layer"))
    tower_cls_query_BLHVD: Tensor | None = view(ViewSpec("tower_cls_query", "tower_layer"))
    tower_received_BLHV: Tensor | None = view(ViewSpec("tower_received", "tower_layer"))
    tower_keys_BLHVD: Tensor | None = view(ViewSpec("tower_keys", "tower_layer"))
    tower_features_BLVD: Tensor | None = view(ViewSpec("tower_features", "tower_layer"))
    projector_BVC: Tensor | None = view(PROJECTOR)
    project: Callable[[Tensor], Tensor] | None = view(PROJECTOR)
    pixels_BVC: Tensor | None = view(PIXELS)
    pixel_images: int = 1

    @classmethod
    def of(cls, vision_BVD: Tensor, grid: tuple[int, int] | None = None, **views: Any) -> TokenView:
        """A view of plain tensors, to try a pruner without a model.

        Args:
            vision_BVD: features (B, V, D).
            grid: rows and columns of the V tokens; one row of V without it.
            **views: any further field of the view.

        Raises:
            ValueError: the grid does not hold V tokens.
        """
        B, V, _ = vision_BVD.shape
        rows, cols = grid or (1, V)
        if rows * cols != V:
            raise ValueError(f"A grid of {rows} x {cols} does not hold {V} tokens; leave `grid` out for a plain run.")
        token_V = torch.arange(V, device=vision_BVD.device)
        views.setdefault("valid_BV", torch.ones(B, V, dtype=torch.bool, device=vision_BVD.device))
        for name in ("tile_BV", "image_BV"):
            views.setdefault(name, torch.zeros(B, V, dtype=torch.long, device=vision_BVD.device))
        return cls(
            vision_BVD,
            row_BV=(token_V // cols).expand(B, V),
            col_BV=(token_V % cols).expand(B, V),
            canvas=(rows, cols),
            **views,
        )


VIEWS: dict[str, ViewSpec] = {
    spec.name: spec
    for spec in [*(spec for f in fields(TokenView) for spec in f.metadata.get("views", ())), JOINT]
}  # fmt: skip
"""Every view by name."""


def fields_of(name: str) -> tuple[str, ...]:
    """The fields of `TokenView` that a view fills."""
    return tuple(f.name for f in fields(TokenView) if any(spec.name == name for spec in f.metadata.get("views", ())))


def views_at(*places: str) -> frozenset[str]:
    """Names of the views from these places."""
    return frozenset(name for name, spec in VIEWS.items() if spec.at in places)


PROMPT_VIEWS = frozenset(name for name, spec in VIEWS.items() if spec.prompt)
"""Views that depend on the prompt."""
LAYER_BEFORE_VIEWS = views_at("layer_before")
"""Views of the decoder layer before the stage."""
LAYER_VIEWS = views_at("layer_before", "layer_after")
"""Views of the decoder layers around the stage, which do not exist before the language model."""
TOWER_VIEWS = views_at("tower_layer", "tower")
"""Views that are captured while the vision tower runs."""
TOWER_FIELDS = {name: fields_of(name)[0] for name in sorted(views_at("tower_layer"))}
"""The field of each view of chosen layers of the vision tower."""


class ViewReader:
    """What a class that reads views declares: a pruner, or the scorer of a learned gate."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the views that it reads; `tpcompress.pruners.views.VIEWS` has all."""
        return frozenset()

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """Indices of the tower layers that its tower views contain; negative ones count from the end."""
        return TOWER_LAYERS

    @property
    def prompt_dependent(self) -> bool:
        """True if the selection depends on the prompt, so that an image is pruned again for each question."""
        return bool(self.needs & PROMPT_VIEWS)
