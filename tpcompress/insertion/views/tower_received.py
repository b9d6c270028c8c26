"""View `tower_received`: attention that patches receive in chosen layers of the vision tower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpcompress.insertion.layer_probe import AttentionInputs
from tpcompress.insertion.views.registry import captures

QUERIES = 1024
"""Queries whose attention maps exist at one time."""


@captures("tower_received", "attention")
def tower_received(inputs: AttentionInputs, windows: Sequence[int]) -> Tensor:
    """Attention (B, N, H), fp32: the mean over the queries of the position's window."""
    found, start = [], 0
    for length in windows:
        window = slice(start, start + length)
        total_BHN: Tensor | None = None
        for first in range(start, start + length, QUERIES):
            query_BHQd = inputs.query_BHNd[:, :, first : min(first + QUERIES, start + length)]
            part_BHN = inputs.logits(query_BHQd, inputs.key_BGLd[:, :, window]).softmax(-1).sum(2)
            total_BHN = part_BHN if total_BHN is None else total_BHN + part_BHN
        assert total_BHN is not None
        found.append(total_BHN / length)
        start += length
    return torch.cat(found, -1).mT
