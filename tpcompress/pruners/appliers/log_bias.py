"""Log bias: at full length, the gate multiplies a key's share of the softmax."""

from __future__ import annotations

import math

from torch import Tensor

from tpcompress.pruners.appliers.gather import cut, selected
from tpcompress.pruners.base import Selection, TokenView
from tpcompress.pruners.gate_components import Applier, Choice

FLOOR = -30.0
"""Bias of a token of gate 0: its share of the softmax is below the resolution of fp32."""


class LogBias(Applier):
    """l'_ij = l_ij + log(m_j + e^-30 (1 - m_j)) in every layer after the stage.

    So the softmax weighs keys by m: DynamicViT's masked attention, without its eps, which leaks later tokens, and with
    no row that loses its largest logit. Needs full length; in mode `drop` the sequence is cut as by `gather`.
    dL/dm_j = sum_i a_ij <g_i, v_j - o_i> / m_j, the derivative of removal, for every token; at m = 0 it is that of
    DynamicViT's product, since the floor is part of the formula and no clamp. In fp16 it underflows: use bf16 or fp32.
    With hard gates training is inference to the precision of fp32. With smooth ones a confident model reads through
    them, and they learn little: hard forward is what it is for.
    """

    name = "log_bias"
    full_length = True
    gates = True

    def forward(self, tokens: TokenView, choice: Choice) -> Selection:
        if choice.gate_BV is None or not tokens.soft:
            return cut(tokens, choice)
        return selected(choice, key_bias_BV=log_gate(choice.gate_BV))


def log_gate(gate_BV: Tensor) -> Tensor:
    """log(m + e^-30 (1 - m)), fp32 (B, V): 0 at m = 1, -30 at m = 0, with a finite slope in between."""
    gate_BV, floor = gate_BV.float(), math.exp(FLOOR)
    return (gate_BV + floor * (1 - gate_BV)).log()
