"""Value gate: at full length, the gate multiplies a token's values."""

from __future__ import annotations

from tpcompress.pruners.appliers.gather import cut, selected
from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.gate_components import Applier, Choice


class Value(Applier):
    """v'_j = m_j v_j in every layer after the stage.

    Needs full length; in mode `drop` the sequence is cut as by `gather`. dL/dm_j = sum_i a_ij <g_i, v_j> for every
    token, dropped ones too. Any attention kernel will do, no mask is made.
    With hard gates training is not inference: a token of gate 0 contributes no value, but its key keeps its share of
    the softmax, so that the retained ones weigh less than they will.
    """

    name = "value"
    full_length = True
    gates = True

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        if choice.gate_BV is None or not tokens.soft:
            return cut(tokens, choice)
        return selected(choice, value_gate_BV=choice.gate_BV)
