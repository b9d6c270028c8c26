"""VTW: nothing; every vision token leaves at one layer (arXiv 2405.05803, Visual Tokens Withdrawal)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView


class VTW(Pruner):
    """Withdraws every vision token: from the stage's layer on, only text tokens are left.

        keep_v = 0 for every token v

    Later layers read the image only through what the text tokens have taken over from it. Separators, such
    as LLaVA-NeXT's newlines, are no vision tokens and stay. At layer 0 the model is blind: a lower bound.

    needs nothing    gives no score: all are 0
    Paper: keep_tokens 0 at layer 15 of the 32 of LLaVA-1.5-7B, the first at which the answers of a few samples diverge
        little; `positions: original` is its choice, `compact` its ablation.
    Cost: nothing.
    Unlike the official code: batches, padding, cached generation and training with labels are exact; the layer is the
        plan's and not searched for here.
    """

    name = "vtw"
    paper = "2405.05803"
    keeps_none = True
    group = "reference"
    paper_plan = """
    # VTW (arXiv 2405.05803): all vision tokens leave LLaVA-1.5-7B before layer 15 of 32, so that 270 of 576 are seen
    # by the average layer. Ids stay as they were, as in the paper; its ablation renumbers them (positions: compact).
    stages:
      - {pruner: vtw, layer: 15, keep_tokens: 0} # K = 15
    """

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        return Selection(
            torch.zeros_like(tokens.valid_BV), torch.zeros(tokens.valid_BV.shape, device=tokens.valid_BV.device)
        )
