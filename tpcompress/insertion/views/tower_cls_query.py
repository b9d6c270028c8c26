"""View `tower_cls_query`: query of the class token in chosen layers of the vision tower, repeated for every patch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tpcompress.insertion.layer_probe import AttentionInputs
from tpcompress.insertion.views.class_token import no_class_token
from tpcompress.insertion.views.registry import captures


@captures("tower_cls_query", "attention", why_unavailable=no_class_token)
def tower_cls_query(inputs: AttentionInputs, windows: Sequence[int]) -> Tensor:
    """Queries (B, N, H, d)."""
    return inputs.query_BHNd[:, :, :1].expand_as(inputs.query_BHNd).transpose(1, 2)
