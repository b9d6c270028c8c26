"""View `tower_cls`: attention of the class token in chosen layers of the vision tower."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tpcompress.insertion.layer_probe import AttentionInputs
from tpcompress.insertion.views.class_token import no_class_token
from tpcompress.insertion.views.registry import captures


@captures("tower_cls", "attention", why_unavailable=no_class_token)
def tower_cls(inputs: AttentionInputs, windows: Sequence[int]) -> Tensor:
    """Attention (B, N, H), fp32."""
    weight_BH1N = inputs.logits(inputs.query_BHNd[:, :, :1], inputs.key_BGLd).softmax(-1)
    return weight_BH1N[:, :, 0].mT
