"""Gather with a value gate: the sequence is cut, and the gates of what stays carry a gradient."""

from __future__ import annotations

import torch

from tpcompress.pruners.appliers.gather import cut
from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.gate_components import Applier, Choice


class GatherValue(Applier):
    """v'_j = (1 + m_j - sg(m_j)) v_j in every layer after the stage, for the retained tokens j.

    Needs no full length: training is inference, bit for bit, in both modes. dL/dm_j = sum_i a_ij <g_i, v_j>, as the
    value gate has it, but only retained tokens have one; dropped ones learn through what ties gates together, such as
    their fixed sum. From a scorer without knowledge this selects what is not needed: warm it up at full length, or
    let one step of some run there.
    """

    name = "gather_value"
    gates = True

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        if choice.gate_BV is None:
            return cut(tokens, choice)
        value_gate_BV = torch.ones_like(choice.gate_BV) + (choice.gate_BV - choice.gate_BV.detach())
        return cut(tokens, choice, value_gate_BV=value_gate_BV)
