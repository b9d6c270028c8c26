"""View `tower_keys`: keys of chosen layers of the vision tower, head by head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tpcompress.insertion.layer_probe import AttentionInputs
from tpcompress.insertion.views.registry import captures


@captures("tower_keys", "attention")
def tower_keys(inputs: AttentionInputs, windows: Sequence[int]) -> Tensor:
    """Keys (B, N, H, d)."""
    return inputs.key_BGLd.transpose(1, 2)
