"""Random: retain a seeded random subset; the baseline that many clever rules lose to (arXiv 2502.11501, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.topk import hash_uniform, keep_topk


class Random(Pruner):
    """score(v) = hash(seed, v): uniform, the same for every image, so a batch partner can never change it.

    needs  nothing.     gives  keep_BV, scores_BV in [0, 1).     Cost: one sort of V.
    One seed is one fixed subset of the grid: average over seeds when you report it. With `resample` each image gets
    a fresh subset at every training step, drawn from torch's default generator; evaluation stays fixed.
    """

    name = "random"
    group = "reference"
    paper_plan = """
    # A random subset: 64 of LLaVA-1.5's 576 tokens. One seed is one subset of the grid; report the mean over several.
    stages:
      - {pruner: {type: random, seed: 0}, keep_tokens: 64}
    """
    test_arguments = (
        {"seed": 7},
        {"resample": True},
    )

    def __init__(self, seed: int = 0, resample: bool = False) -> None:
        super().__init__()
        self.seed, self.resample = seed, resample

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        B, V = tokens.valid_BV.shape
        if self.resample and self.training:
            scores_BV = torch.rand(B, V, device=tokens.valid_BV.device)
        else:
            scores_BV = hash_uniform(self.seed, torch.arange(V, device=tokens.valid_BV.device)).expand(B, V)
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)
