"""View `tower_features`: output of chosen layers of the vision tower."""

from __future__ import annotations

from torch import Tensor

from tpcompress.insertion.views.registry import captures


@captures("tower_features", "layer_output")
def tower_features(output_BND: Tensor) -> Tensor:
    """Features (B, N, D)."""
    return output_BND.detach()
