"""What a pruner is: a pure function of tensors, `TokenView -> Selection`.

B rows (one per image, or one per prompt under `scope: prompt`), V vision tokens (padded), D hidden size,
S sequence length, H attention heads, Dk width of all key heads together.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenView:
    """What a pruner may look at. Optional fields are filled only if the pruner lists them in `needs`.

    Attributes:
        vision_BVD: hidden states of the vision tokens at the stage, in sequence order.
        valid_BV: False where a shorter row was padded.
        row_BV: grid row of each token in its image (several images of one row are stacked).
        col_BV: grid column of each token.
        canvas: (rows, columns) of the smallest grid that holds every row of the batch.
        soft: the caller keeps the full length, so a pruner in training may answer with gates.
        text_BSD: hidden states of the prompt (needs "text"), at sequence length.
        text_valid_BS: True on prompt text after the row's vision tokens; never on an answer.
        keys_BVD: keys of the layer before, after rotary embedding, heads side by side (B, V, Dk) (needs "keys").
        text_keys_BSD: the same for every position of the sequence (B, S, Dk) (needs "keys").
        attention_BHV: attention of the last prompt token to the vision tokens in the layer before (needs "attention").
    """

    vision_BVD: Tensor
    valid_BV: Tensor
    row_BV: Tensor
    col_BV: Tensor
    canvas: tuple[int, int]
    soft: bool = False
    text_BSD: Tensor | None = None
    text_valid_BS: Tensor | None = None
    keys_BVD: Tensor | None = None
    text_keys_BSD: Tensor | None = None
    attention_BHV: Tensor | None = None

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
        keep_BV: bool, the one truth: exactly `num_keep` True per row.
        scores_BV: higher = keep; for plots, losses and tie-breaking.
        gate_BV: smooth weights in [0, 1] that sum to `num_keep` (training at full length only).
        vision_BVD: new values of the vision tokens (merging pruners; noise gate); None leaves them as they are.
    """

    keep_BV: Tensor
    scores_BV: Tensor
    gate_BV: Tensor | None = None
    vision_BVD: Tensor | None = None


class Pruner(nn.Module):
    """A rule that says which vision tokens stay.

    Subclasses set `name` (the word used in plans, YAML, tables and checkpoints), take plain values in `__init__`
    and keep them under their own names, so that `config` and `from_config` come for free.
    """

    name: ClassVar[str]
    merges: ClassVar[bool] = False
    """Retained tokens absorb dropped ones."""
    starts_as: ClassVar[str | None] = None
    """The training-free pruner that a learned one equals before its training: its control in comparisons."""

    @property
    def needs(self) -> frozenset[str]:
        """Optional views it reads: any of "text", "keys", "attention"."""
        return frozenset()

    @property
    def prompt_dependent(self) -> bool:
        """The choice depends on the prompt, so an image cannot be pruned once for all its questions."""
        return bool(self.needs & {"text", "attention"})

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

    def config(self) -> dict[str, Any]:
        """Its name and arguments, as they are written to config.json; `create` is the inverse.

        A pruner from outside this package goes by its dotted path, which is how `create` finds it again.
        """
        cls = type(self)
        inside = cls.__module__.startswith(f"{__package__}.")
        name = self.name if inside else f"{cls.__module__}.{cls.__qualname__}"
        return {"type": name} | {n: getattr(self, n) for n in self.argument_names()}

    @classmethod
    def argument_names(cls) -> list[str]:
        """What `__init__` takes by name; a pruner without one inherits nn.Module's `(*args, **kwargs)`."""
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return [p.name for p in parameters if p.kind not in variadic]

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config().items() if k != "type")
