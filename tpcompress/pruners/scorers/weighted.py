"""What scorers with weights share: weights in fp32, made once; arithmetic in fp32; ties broken by position.

B rows, V vision tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.gate_components import Scorer, Scores

TIE = 1e-3
"""Largest number that `spread` adds to a score: above rounding, far below differences between tokens."""

GOLDEN = 0x9E3779B1
"""2^32 / 1.618..., whose multiples are spread evenly over the 32-bit numbers."""


class WeightedScorer(Scorer):
    """A scorer with weights: subclasses define `make` and `rate`.

    Weights are fp32 whatever dtype is the default when they are made. Scores are computed in fp32: out of autocast,
    from hidden states of any dtype, and also where a caller has cast the weights with the rest of a model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size: int | None = None

    @property
    def learned(self) -> bool:
        return True

    def make(self, hidden_size: int) -> None:
        """Create the weights."""
        raise NotImplementedError(f"{type(self).__name__} must define make(hidden_size).")

    def rate(self, tokens: TokenView) -> Scores:
        """Score every token, in the dtype of the weights: fp32, or fp64 after `.double()`."""
        raise NotImplementedError(f"{type(self).__name__} must define rate(tokens) -> Scores.")

    def build(self, hidden_size: int) -> None:
        if self.hidden_size is None:
            self.make(hidden_size)
            self.float()
            self.hidden_size = hidden_size
        elif self.hidden_size != hidden_size:
            raise ValueError(
                f"This {self.name} was built for width {self.hidden_size}, the model has {hidden_size}; make a new one."
            )

    def forward(self, tokens: TokenView) -> Scores:
        """Score every token.

        Raises:
            RuntimeError: the weights have not been made.
        """
        if self.hidden_size is None:
            raise RuntimeError(f"{self.name} has no weights yet; call build(hidden_size), or attach it to a model.")
        half = {name: p.float() for name, p in self.named_parameters() if p.element_size() < 4}
        if half:
            scores: Any = functional_call(self, half, (tokens,))
            return scores
        with torch.autocast(tokens.vision_BVD.device.type, enabled=False):
            return self.rate(tokens)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, and so of its arithmetic."""
        return next(self.parameters()).dtype


def spread(valid_BV: Tensor) -> Tensor:
    """A number in [0, `TIE`) for each token, fp32 (B, V), that breaks ties: the best k tokens lie evenly in the row.

    Multiples of the golden ratio modulo 1, in whole numbers, so it is the same on every device. Equal scores would
    fall to the first tokens, the top of the image, otherwise. Padding changes nothing.
    """
    number_BV = valid_BV.long().cumsum(1)
    return (((number_BV * GOLDEN) & 0xFFFFFFFF) >> 8).float() * (TIE / 2**24)


def masked_mean(x_BVC: Tensor, valid_BV: Tensor) -> Tensor:
    """Mean (B, 1, C) over the valid tokens of each row; 0 where there is none."""
    total_B1C = x_BVC.masked_fill(~valid_BV[..., None], 0.0).sum(1, keepdim=True)
    return total_B1C / valid_BV.sum(1)[:, None, None].clamp(min=1)
