"""DART as in its official code: retained counts, and pivots in the iteration order of a Python set.

`dart` with `compat` selects what the official code selects in fp32, for one image without separators:
    llava     4 + 8 m tokens with m = floor(min(budget, V - 4) / 8); the cap is that of the code for LLaVA-NeXT, without
              which the code for LLaVA-1.5 stops with an error above V - 4
    qwen      4 + 8 m tokens with m = int(V (1 - reduction) / 8), whatever the plan's budget
(4 and 8: the vision pivots and all pivots). Pivots are visited in the order of a Python set of their positions, and
text pivots come from the text tokens after the image only. Where the official code stops with an error - fewer text
tokens after the image than text pivots, or fewer than m free tokens - the count stays as above, or all tokens are
retained.

B rows, V vision tokens, P pivots, N slots of a hash table, T slots tried.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompress.pruners.base import SYSTEM, TokenView

OFFICIAL = ("llava", "qwen")
"""The two codes that differ in their counts."""


def check_reduction(compat: str, reduction: float) -> None:
    """Check that `reduction` is given where the count depends on it, and nowhere else.

    Raises:
        ValueError: it is missing with `qwen`, or given without.
    """
    if (compat == "qwen") != (0 < reduction < 1):
        raise ValueError(
            f"dart takes its count from reduction, in (0, 1), with compat 'qwen' and only there; got {reduction} "
            f"with compat {compat!r}."
        )


def official_count(
    valid_B: Tensor, budget_B: Tensor, vision_pivots: int, text_pivots: int, compat: str, reduction: float
) -> Tensor:
    """Tokens that each row retains, int64 (B,).

    Args:
        valid_B: vision tokens of each row.
        budget_B: the plan's budget, on the same device.
        vision_pivots, text_pivots: numbers of pivots.
        compat: one of `OFFICIAL`.
        reduction: share of dropped tokens with `qwen`.
    """
    pivots = vision_pivots + text_pivots
    if compat == "llava":
        share_B = budget_B.minimum(valid_B - vision_pivots).clamp(min=0) // pivots
    else:
        share_B = (valid_B.double() * (1 - reduction) / pivots).long()
    return (vision_pivots + pivots * share_B).minimum(valid_B)


def official_order(tokens: TokenView, place_BP: Tensor) -> Tensor:
    """Order in which pivots are visited, int64 (B, P): indices into P.

    Args:
        tokens: view with the roles of the prompt.
        place_BP: place of each pivot, counted from the first vision token.
    """
    assert tokens.text_role_BS is not None
    return set_order((tokens.text_role_BS == SYSTEM).sum(1, keepdim=True) + place_BP)


def set_order(value_BP: Tensor) -> Tensor:
    """The order in which CPython walks through `set(values)` of each row: that of the slots of its hash table.

    A whole number is its own hash. A table of n slots (8 at first) is tried at i = hash mod n and, if they all exist,
    at the 9 slots after; then at i = 5 i + 1 + hash >> 5, hash >> 10, ... An insertion that fills 3/5 of n - 1 slots
    moves everything, slot by slot, to the smallest power of two above 4 times what is held.

    Args:
        value_BP: different whole numbers >= 0 (B, P), in the order of their insertion.

    Returns:
        int64 (B, P): indices into P, in the order of the visits.
    """
    B, P = value_BP.shape
    size, slot_BN = 8, value_BP.new_full((B, 8), P)  # P stands for an empty slot
    probe_BPT = _probes(value_BP, size)
    for held in range(1, P + 1):
        slot_BN = _insert(slot_BN, probe_BPT[:, held - 1], value_BP.new_full((B, 1), held - 1), P)
        if held * 5 >= (size - 1) * 3:
            while size <= 4 * held:
                size *= 2
            order_BP = _held_first(slot_BN, P)
            slot_BN, probe_BPT = value_BP.new_full((B, size), P), _probes(value_BP, size)
            for n in range(held):
                entry_B1 = order_BP[:, n : n + 1]
                tried_BT = probe_BPT.gather(1, entry_B1[..., None].expand(-1, -1, probe_BPT.shape[-1]))[:, 0]
                slot_BN = _insert(slot_BN, tried_BT, entry_B1, P)
    return _held_first(slot_BN, P)[:, :P]


def _held_first(slot_BN: Tensor, empty: int) -> Tensor:
    return slot_BN.gather(1, (slot_BN == empty).to(torch.int8).argsort(dim=1, stable=True))


def _probes(value_BP: Tensor, size: int) -> Tensor:
    """The slots that each value tries, in order (B, P, T); steps that are not taken repeat the slot before them."""
    index_BP, rest_BP, tried = value_BP % size, value_BP, []
    step_T = torch.arange(10, device=value_BP.device)
    # After 13 rounds nothing is left of a 64-bit hash; from then on no start comes twice before all slots were one.
    for _ in range(14 + value_BP.shape[1]):
        far_BP1 = (index_BP + 9 < size)[..., None]
        tried.append(index_BP[..., None] + step_T * far_BP1)
        rest_BP = rest_BP >> 5
        index_BP = (index_BP * 5 + 1 + rest_BP) % size
    return torch.cat(tried, -1)


def _insert(slot_BN: Tensor, tried_BT: Tensor, entry_B1: Tensor, empty: int) -> Tensor:
    """The entry in the first empty slot that it tries."""
    free_BT = slot_BN.gather(1, tried_BT) == empty
    first_B1 = free_BT.to(torch.int8).argmax(1, keepdim=True)
    return slot_BN.scatter(1, tried_BT.gather(1, first_B1), entry_B1)
