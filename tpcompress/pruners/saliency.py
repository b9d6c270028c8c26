"""How much the vision tower itself attends to each token: what encoder-side pruners start from.

B rows, V tokens, L layers, H heads.
"""

from __future__ import annotations

from torch import Tensor

from tpcompress.pruners.base import TokenView

SOURCES = {"class": "tower_cls", "received": "tower_received"}
"""The view behind each source: attention of the class token (CLIP and its like), or the mean attention that a patch
receives from all others (towers without a class token)."""


def check_source(pruner: str, source: str) -> None:
    """Refuse a source that is not one.

    Raises:
        ValueError: it is not in `SOURCES`.
    """
    if source not in SOURCES:
        raise ValueError(f"{pruner} has no attention source '{source}'; choose one of {', '.join(SOURCES)}.")


def saliency(tokens: TokenView, source: str, layer: int = 0) -> Tensor:
    """Mean over heads of the attention to each token, fp32 (B, V).

    Args:
        tokens: with the view of `SOURCES[source]`.
        source: "class" or "received".
        layer: which of the pruner's `tower_layers`, counted from 0.
    """
    attention_BLHV = tokens.tower_cls_BLHV if source == "class" else tokens.tower_received_BLHV
    assert attention_BLHV is not None
    return attention_BLHV[:, layer].float().mean(1)
