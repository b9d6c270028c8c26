"""Scaled embeddings: at full length, the gate multiplies the token itself."""

from __future__ import annotations

from tpcompress.pruners.appliers.gather import cut, selected
from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.gate_components import Applier, Choice


class Scale(Applier):
    """x'_j = m_j x_j at the stage.

    For reproduction only. Language models norm what they read, and norm(m x) = norm(x): a gate of 0.01 leaves the first
    layer's values at 98 % of their size, so the model reads through it, and only the radial part of the gradient comes
    back. Even a token of gate 0 keeps its share of the softmax. `value`, `noise` and `log_bias` act where a norm does
    not undo it.
    Needs full length; in mode `drop` the sequence is cut as by `gather`, retained tokens unscaled.
    Source: VisionSelector (2510.16598).
    """

    name = "scale"
    full_length = True

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        if choice.gate_BV is None or not tokens.soft:
            return cut(tokens, choice)
        vision_BVD = (tokens.vision_BVD.float() * choice.gate_BV[..., None].float()).to(tokens.vision_BVD.dtype)
        return selected(choice, vision_BVD=vision_BVD)
