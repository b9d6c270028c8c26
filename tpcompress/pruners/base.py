"""What a pruner is: a pure function of tensors, `TokenView -> Selection`.

B rows (one per image, or one per prompt under `scope: prompt`), V vision tokens (padded), D hidden size,
S sequence length, H attention heads, Q words of the prompt (padded), L layers of the vision tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tpcompress.pruners.config_mixin import ConfigMixin

SYSTEM, BETWEEN, INSTRUCTION = 1, 2, 3
"""Roles of the words of a prompt: before a row's first vision token, among its vision tokens, after its last one.
Everything else has role 0: vision tokens, separators, padding, and every word of an answer."""

TOWER_LAYERS = (-2,)
"""The layer of a vision tower whose attention, keys and features most pruners read."""

BEFORE_VIEWS = frozenset({"keys", "values", "attention", "attention_prompt", "attention_last_vision"})
"""Views of the layer before the stage."""

LAYER_VIEWS = BEFORE_VIEWS | {"attention_next"}
"""Views of the layers around the stage: they do not exist before the language model."""

LOOSE_VIEWS = frozenset({"projector", "pixels"})
"""Views around the vision tower that belong to no layer of it."""

TOWER_FIELDS = {
    "tower_cls": "tower_cls_BLHV",
    "tower_cls_query": "tower_cls_query_BLHVD",
    "tower_received": "tower_received_BLHV",
    "tower_keys": "tower_keys_BLHVD",
    "tower_features": "tower_features_BLVD",
}
"""The field of `TokenView` that holds each view of chosen layers of the vision tower."""

TOWER_VIEWS = LOOSE_VIEWS | TOWER_FIELDS.keys()
"""Views that are seen while the vision tower runs."""

PROMPT_VIEWS = frozenset({"text", "attention", "attention_prompt", "attention_next", "input", "joint"})
"""Views that show the prompt."""


@dataclass(frozen=True)
class TokenView:
    """What a pruner may look at. Optional fields are filled only if the pruner lists them in `needs`.

    Only `vision_BVD` and `text_BSD` carry a gradient. Where a row is padded, fields over V hold some other token.

    Attributes:
        vision_BVD: hidden states of the vision tokens at the stage, in sequence order.
        valid_BV: False where a shorter row was padded.
        row_BV: grid row of each token in its image (its rectangles, and several images of one row, are stacked).
        col_BV: grid column of each token.
        tile_BV: rectangle of each token, counted in its row: the tile of an image, the frame of a video.
        image_BV: image or video of each token, counted in its row; 0 except under `scope: prompt`.
        canvas: (rows, columns) of the smallest grid that holds every row of the batch.
        video_BV: True on tokens of a video, whose rectangles are its frames; None where nobody can tell.
        soft: the caller keeps the full length, so a pruner in training may answer with gates.
        text_BSD: hidden states of the whole sequence (B, S, D) (needs "text").
        column_BV: int64, column of each vision token in `text_BSD` (needs "text").
        text_role_BS: int8, SYSTEM, BETWEEN, INSTRUCTION, or 0 where nothing may be read (needs "text").
        text_valid_BS: the instruction; all words of a prompt that has none (needs "text").
        keys_BVD: keys of the layer before, after rotary embedding, heads side by side (needs "keys").
        text_keys_BSD: the same for every position of the sequence (needs "keys").
        attention_BHV: attention of the last prompt token to the vision tokens in the layer before, fp32, as the
            model's own softmax over everything that the token sees (needs "attention").
        attention_prompt_BHQV: the same for every word of the prompt, 0 where the role is 0 (needs "attention_prompt").
        prompt_column_BQ: position of each of these words in the sequence, as in `text_BSD` (needs "attention_prompt" or
            "input").
        prompt_role_BQ: their roles; 0 where a shorter prompt was padded.
        attention_last_vision_BHV: the same for the row's last vision token (needs "attention_last_vision").
        attention_next_BHV: attention that the last prompt token would pay in the layer behind the stage if nothing was
            dropped (needs "attention_next").
        input_vision_BUD: hidden states of all vision tokens at the language model's input, whatever earlier stages
            inside it dropped (needs "input").
        input_valid_BU: False where a shorter row of them was padded (needs "input").
        input_prompt_BQD: the same for the words of the prompt, as `prompt_column_BQ` lists them (needs "input").
        tower_cls_BLHV: attention of the class token to the patches in layers `tower_layers` of the vision tower, fp32
            (needs "tower_cls").
        tower_cls_query_BLHVD: the query of the class token of each token's image or tile, head by head (needs
            "tower_cls_query").
        tower_received_BLHV: attention that patches receive there, mean over all queries of their attention window, the
            class token among them, fp32 (needs "tower_received").
        tower_keys_BLHVD: keys of these layers, head by head (needs "tower_keys").
        tower_features_BLVD: output of these layers, before the projector (needs "tower_features").
        values_BVD: values of the layer before, heads side by side (needs "values").
        text_values_BSD: the same for every position of the sequence (needs "values").
        normed_BVD: the hidden states after the language model's last norm (needs "normed").
        text_normed_BSD: the same for every position of the sequence (needs "normed").
        projector_BVC: what the projector was given for each token; one patch is one token there (needs "projector").
        project: the projector itself, token by token: (..., C) -> (..., D) (needs "projector").
        pixels_BVC: the pixels of each token's patches, as the tower was given them (needs "pixels"): its
            `pixel_images` images one after the other, in each the channels one after the other.
        pixel_images: consecutive images of a video that one vision token holds.

    A vision token that the model makes of several patches has the mean of their values, weighted as the model itself
    weighs them.
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
    text_BSD: Tensor | None = None
    column_BV: Tensor | None = None
    text_role_BS: Tensor | None = None
    text_valid_BS: Tensor | None = None
    keys_BVD: Tensor | None = None
    text_keys_BSD: Tensor | None = None
    attention_BHV: Tensor | None = None
    attention_prompt_BHQV: Tensor | None = None
    prompt_column_BQ: Tensor | None = None
    prompt_role_BQ: Tensor | None = None
    attention_last_vision_BHV: Tensor | None = None
    attention_next_BHV: Tensor | None = None
    input_vision_BUD: Tensor | None = None
    input_valid_BU: Tensor | None = None
    input_prompt_BQD: Tensor | None = None
    tower_cls_BLHV: Tensor | None = None
    tower_cls_query_BLHVD: Tensor | None = None
    tower_received_BLHV: Tensor | None = None
    tower_keys_BLHVD: Tensor | None = None
    tower_features_BLVD: Tensor | None = None
    values_BVD: Tensor | None = None
    text_values_BSD: Tensor | None = None
    normed_BVD: Tensor | None = None
    text_normed_BSD: Tensor | None = None
    projector_BVC: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    pixels_BVC: Tensor | None = None
    pixel_images: int = 1

    @classmethod
    def of(cls, vision_BVD: Tensor, grid: tuple[int, int] | None = None, **views: Any) -> TokenView:
        """A view over plain tensors, to try a pruner without a model.

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


@dataclass(frozen=True)
class Selection:
    """What a pruner answers; it never touches the sequence itself.

    Attributes:
        keep_BV: bool, the one truth: exactly `num_keep` True per row, unless the pruner is not `exact`.
        scores_BV: higher = keep; for plots, losses and tie-breaking.
        gate_BV: weights in [0, 1] that carry a gradient, smooth or 0/1 in the forward pass (training only). Under a
            view that is `soft` nothing is cut then.
        vision_BVD: new values of the vision tokens (merging pruners; noise gate); None leaves them as they are.
        size_BV: how many tokens each retained one stands for, fp32; layers behind the stage then weigh its key by it
            (proportional attention). None weighs all alike.
        place_BV: int64, the token whose position each retained one takes; None leaves each at its own.
        value_gate_BV: multiplies the values of the tokens in every layer behind the stage (training only); None is 1.
        key_bias_BV: fp32, is added to the attention logits of their keys there (training only); None is 0.
        log_prob_B: log probability of the drawn set, for a loss by score function; None if nothing was drawn.
        expected_B: expected number of retained tokens, with a gradient; None if the count is not learned.
        text_BSD: what a scorer made of the whole sequence, for a loss of its own.
    """

    keep_BV: Tensor
    scores_BV: Tensor
    gate_BV: Tensor | None = None
    vision_BVD: Tensor | None = None
    size_BV: Tensor | None = None
    place_BV: Tensor | None = None
    value_gate_BV: Tensor | None = None
    key_bias_BV: Tensor | None = None
    log_prob_B: Tensor | None = None
    expected_B: Tensor | None = None
    text_BSD: Tensor | None = None


class Pruner(ConfigMixin):
    """Base class of pruners: a pruner chooses which vision tokens are retained.

    Subclasses set `name` (the key in plans, YAML, tables and checkpoints), take plain values in `__init__` and store
    them under their own names, so that `config` works without further code; `create` is its inverse. The other class
    attributes describe the pruner; those that depend on arguments are set in `__init__`.
    """

    paper: ClassVar[str] = "ours"
    """arXiv number of the method's paper, or `ours`."""
    merges: bool = False
    """Retained tokens absorb dropped ones: the selection contains new values of the vision tokens."""
    exact_count: bool = True
    """If False, the pruner chooses its own count; reading it costs one host-device sync per prefill."""
    differentiable: bool = False
    """True if a gradient reaches the scores."""
    uses_token_sizes: bool = False
    """The selection contains sizes or positions of retained tokens, which layers after the stage must apply."""
    trainable_when_cut: bool = False
    """True if weights receive a gradient when the sequence is cut; otherwise they train at full length only."""
    trains_through_model: bool = True
    """True if the model's output depends on the pruner's weights during training. If False, add a loss on the selection
    (e.g. `Imitate`)."""
    gates: bool = False
    """In training, the selection may act inside the attention of later layers: by value gates or key biases."""
    keeps_none: ClassVar[bool] = False
    """Retains no token: the budget of its stage is 0, which no other pruner accepts."""
    untrained_equivalent: str | None = None
    """The training-free pruner that a learned one equals before training: its control in comparisons."""

    @property
    def needs(self) -> frozenset[str]:
        """Optional views it reads: any of "text", "keys", "values", "normed", "attention", "attention_prompt",
        "attention_last_vision", "attention_next", "input", "tower_cls", "tower_cls_query", "tower_received",
        "tower_keys", "tower_features", "projector", "pixels", "joint"; see `TokenView`."""
        return frozenset()

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """Layers of the vision tower that its views show, 0 the first; negative numbers count from the end."""
        return TOWER_LAYERS

    @property
    def prompt_dependent(self) -> bool:
        """The choice depends on the prompt, so an image cannot be pruned once for all its questions."""
        return bool(self.needs & PROMPT_VIEWS)

    @property
    def learned(self) -> bool:
        """It has weights of its own to train."""
        return False

    def build(self, hidden_size: int) -> None:
        """Create weights once the model's width is known. Most pruners have none."""

    def set_progress(self, progress: float) -> None:
        """Tell a learned pruner how far its training is, from 0 to 1. Most pruners do not care."""

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        """Choose the tokens to keep.

        Args:
            tokens: what may be looked at.
            num_keep_B: int64 (B,) on the CPU (counts are the host's knowledge): how many tokens each row keeps,
                at most its number of valid tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(tokens, num_keep_B) -> Selection.")
