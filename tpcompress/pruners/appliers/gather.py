"""Gather: the sequence is cut to the choice, nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.gate_components import Applier, Choice


class Gather(Applier):
    """x' = x; the tokens of the choice stay.

    Needs no full length: training is inference, bit for bit, and as fast. Gates do not act; where the sequence is cut
    (mode `drop`) they go along for losses on gates. With gates alone a scorer learns nothing from the model here.
    """

    name = "gather"
    trains_through_model = False

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        return cut(tokens, choice)


def cut(tokens: TokenView, choice: Choice, **more: Any) -> Selection:
    """The choice as a selection that is cut, or hidden under a view that is soft: there it may hold no gate.

    Args:
        tokens: what the choice was made from.
        choice: a selector's.
        **more: further fields of the selection.
    """
    return selected(replace(choice, gate_BV=None) if tokens.soft else choice, **more)


def selected(choice: Choice, **more: Any) -> Selection:
    """The choice as a selection; one with a gate keeps the full length under a view that is soft.

    Args:
        choice: a selector's.
        **more: further fields of the selection.
    """
    return Selection(
        choice.keep_BV,
        choice.scores_BV,
        choice.gate_BV,
        log_prob_B=choice.log_prob_B,
        expected_B=choice.expected_B,
        **more,
    )
