"""Attention of the vision tower to each token, and merging before the projector, for encoder-side pruners.

B rows, V tokens, L layers, H heads, C width of what the projector is given, K slots of merged tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.topk import head_mean

SOURCES = {"class": "tower_cls", "received": "tower_received"}
"""The view of each source: attention of the class token (CLIP and its like), or the mean attention that a patch
receives from all others (towers without a class token)."""

MERGE_AT = ("features", "tokens")
"""Where merging pruners add up: what the projector is given, as the papers do (its result is the projector's again), or
what it returned (for projectors that do not work token by token)."""


def check_source(pruner: str, source: str) -> None:
    """Refuse a source that is not one.

    Raises:
        ValueError: it is not in `SOURCES`.
    """
    if source not in SOURCES:
        raise ValueError(f"{pruner} has no attention source '{source}'; choose one of {', '.join(SOURCES)}.")


def check_merge_at(pruner: str, merge_at: str) -> None:
    """Refuse a place to merge at that is not one.

    Raises:
        ValueError: it is not in `MERGE_AT`.
    """
    if merge_at not in MERGE_AT:
        raise ValueError(f"{pruner} cannot merge at '{merge_at}'; choose one of {', '.join(MERGE_AT)}.")


def check_share(pruner: str, argument: str, value: float) -> None:
    """Refuse a share that is none.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{pruner} needs {argument} between 0 and 1, got {value}; give a share of the budget.")


def saliency(tokens: TokenView, source: str, layer: int = 0) -> Tensor:
    """Mean over heads of the attention to each token, fp32 (B, V).

    Args:
        tokens: with the view of `SOURCES[source]`.
        source: "class" or "received".
        layer: which of the pruner's `tower_layers`, counted from 0.
    """
    attention_BLHV = tokens.tower_cls_BLHV if source == "class" else tokens.tower_received_BLHV
    assert attention_BLHV is not None
    return head_mean(attention_BLHV[:, layer])


def in_tiers(tier_BV: Tensor, attention_BV: Tensor) -> Tensor:
    """Scores that rank by tier, and by attention a >= 0 inside one: tier + a / (1 + a), fp32 (B, V)."""
    return tier_BV + attention_BV / (1 + attention_BV)


def to_merge(tokens: TokenView, merge_at: str) -> Tensor:
    """What is added up at `merge_at`, fp32 (B, V, C)."""
    if merge_at == "tokens":
        return tokens.vision_BVD.float()
    assert tokens.projector_BVC is not None
    return tokens.projector_BVC.float()


def put(tokens: TokenView, merge_at: str, merged_BKC: Tensor, index_BK: Tensor, exists_BK: Tensor) -> Tensor:
    """The vision tokens (B, V, D) with merged ones at their slots; all others as they were.

    Args:
        tokens: with the projector's views if `merge_at` is "features".
        merge_at: what `merged_BKC` was made of.
        merged_BKC: fp32 (B, K, C).
        index_BK: the token that each slot replaces.
        exists_BK: False where a slot is none.
    """
    vision_BVD = tokens.vision_BVD
    if merge_at == "features":
        assert tokens.project is not None and tokens.projector_BVC is not None
        merged_BKC = tokens.project(merged_BKC.to(tokens.projector_BVC.dtype))
    V, D = vision_BVD.shape[1:]
    # One place more than there are tokens takes what no token should.
    index_BKD = index_BK.masked_fill(~exists_BK, V)[..., None].expand(-1, -1, D)
    wide_BVD = torch.cat([vision_BVD, vision_BVD[:, :1]], 1)
    return wide_BVD.scatter(1, index_BKD, merged_BKC.to(vision_BVD.dtype))[:, :V]
