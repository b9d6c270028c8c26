"""Merging: which retained token each dropped one joins, and what becomes of the values of a group.

A group is a retained token and the dropped ones that joined it. `group_BV` says for every token which token its group
goes by; a retained token goes by itself, padding too.

B rows, V tokens, D features, K retained slots, N tokens left in a round, A and C its two sets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompress.pruners.base import TokenView
from tpcompress.pruners.topk import SAME, on, rank, slots, take

METRICS = {"features": frozenset[str](), "keys": frozenset({"tower_keys"})}
"""What tokens are compared by, and the view of it: their hidden states at the stage, or the keys of a layer of the
vision tower."""


def check_metric(pruner: str, metric: str) -> None:
    """Refuse a metric that is not one.

    Raises:
        ValueError: it is not in `METRICS`.
    """
    if metric not in METRICS:
        raise ValueError(f"{pruner} has no metric '{metric}'; choose one of {', '.join(METRICS)}.")


def check_rounds(pruner: str, rounds: int) -> None:
    """Refuse a number of rounds that is none.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"{pruner} merges in rounds, a whole number of at least 1, got {rounds!r}.")


def metric_of(tokens: TokenView, metric: str, layer: int = 0) -> Tensor:
    """What tokens are compared by, fp32 (B, V, D); no gradient reaches it.

    Args:
        tokens: with the view of `METRICS[metric]`.
        metric: "features", or "keys" for the mean of the tower's keys over heads.
        layer: which of the pruner's `tower_layers`, counted from 0.
    """
    if metric == "features":
        return tokens.vision_BVD.detach().float()
    assert tokens.tower_keys_BLHVD is not None
    return tokens.tower_keys_BLHVD[:, layer].detach().float().mean(1)


@torch.no_grad()
def nearest_kept(similar_BVD: Tensor, keep_BV: Tensor, valid_BV: Tensor, num_keep: int) -> tuple[Tensor, Tensor]:
    """The retained token that each dropped one is most similar to (cosine); ties go to the earlier one.

    Args:
        similar_BVD: what tokens are compared by.
        keep_BV: the retained tokens, at least one in every row.
        valid_BV: bool (B, V).
        num_keep: K, no fewer than any row retains; known on the host.

    Returns:
        `group_BV`, int64, and fp32 (B, V): the similarity to that token, 1 for retained tokens and padding.
    """
    kept_BK, exists_BK = slots(keep_BV, num_keep)
    unit_BVD = F.normalize(similar_BVD.float(), dim=-1)
    similar_BKV = (take(unit_BVD, kept_BK) @ unit_BVD.mT).masked_fill(~exists_BK[..., None], -torch.inf)
    best_BV, slot_BV = similar_BKV.max(1)
    itself_BV = torch.arange(keep_BV.shape[1], device=keep_BV.device).expand_as(slot_BV)
    joins_BV = valid_BV & ~keep_BV
    return torch.where(joins_BV, kept_BK.gather(1, slot_BV), itself_BV), best_BV.masked_fill(~joins_BV, 1.0)


def merge_groups(
    x_BVD: Tensor, group_BV: Tensor, keep_BV: Tensor, num_keep: int, weight_BV: Tensor | None = None
) -> Tensor:
    """The mean of each group, at its retained token; all other tokens stay as they are, bit for bit.

    Args:
        x_BVD: values to merge; the gradient reaches every member of a group.
        group_BV: the token that each one's group goes by.
        keep_BV: the retained tokens.
        num_keep: K, no fewer than any row retains; known on the host.
        weight_BV: how much each token counts in its group's mean, not negative; all alike without it.

    Returns:
        (B, V, D) in the dtype of `x_BVD`. Sums are in fp32; a group whose weights are all 0 keeps its token's value.
    """
    kept_BK, exists_BK = slots(keep_BV, num_keep)
    # Products with a K x V matrix instead of scattered additions, whose order a GPU does not fix.
    share_BKV = (group_BV[:, None] == kept_BK[..., None]).float()
    if weight_BV is not None:
        share_BKV = share_BKV * weight_BV.float()[:, None]
    total_BK1 = share_BKV.sum(-1, keepdim=True)
    mean_BKD = (share_BKV @ x_BVD.float()) / torch.where(total_BK1 > 0, total_BK1, 1.0)
    changed_BK = (group_sizes(group_BV).gather(1, kept_BK) > 1) & (total_BK1[..., 0] > 0) & exists_BK
    index_BKD = kept_BK[..., None].expand(-1, -1, x_BVD.shape[-1])
    merged_BKD = torch.where(changed_BK[..., None], mean_BKD.to(x_BVD.dtype), take(x_BVD, kept_BK))
    return x_BVD.scatter(1, index_BKD, merged_BKD)


def group_sizes(group_BV: Tensor) -> Tensor:
    """int64 (B, V): how many tokens each one stands for; 0 where it joined another."""
    return torch.zeros_like(group_BV).scatter_add_(1, group_BV, torch.ones_like(group_BV))


def merge_into_kept(
    x_BVD: Tensor,
    keep_BV: Tensor,
    valid_BV: Tensor,
    num_keep: int,
    similar_BVD: Tensor | None = None,
    weight_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge every dropped token into the retained one most similar to it (cosine); ties go to the earlier one.

    Args:
        x_BVD: values to merge.
        keep_BV: the retained tokens, at least one in every row.
        valid_BV: bool (B, V).
        num_keep: K, no fewer than any row retains: `int(num_keep_B.max())`.
        similar_BVD: what tokens are compared by; the values without it.
        weight_BV: how much each token counts in its group's mean, not negative; all alike without it.

    Returns:
        New values (B, V, D), and the size of each token's group, fp32 (B, V), 1 for whatever is not retained. Rows
        that retain everything have their values back bit for bit.
    """
    group_BV, _ = nearest_kept(x_BVD if similar_BVD is None else similar_BVD, keep_BV, valid_BV, num_keep)
    merged_BVD = merge_groups(x_BVD, group_BV, keep_BV, num_keep, weight_BV)
    return merged_BVD, group_sizes(group_BV).clamp(min=1).float()


@torch.no_grad()
def bipartite(
    metric_BVD: Tensor, valid_BV: Tensor, num_keep_B: Tensor, rounds: int, average: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds of bipartite soft matching until the budget is left.

    In a round the tokens left are dealt in turn to sets A and C, the first one to A. Each of A points at the most
    similar one of C (cosine), and the r most similar pairs are joined: the token of A is dropped and the token of C
    stands for both. Ties go to the earlier token. r is the same in each of the rounds, (V - budget) / rounds to within
    one token, but never more than half of what is left; what that leaves too many goes in further rounds.

    Args:
        metric_BVD: what tokens are compared by.
        valid_BV: bool (B, V).
        num_keep_B: int64 (B,) on the CPU.
        rounds: at least 1.
        average: whether a token is compared, from the next round on, by the mean over all that it stands for, or as
            it was.

    Returns:
        keep_BV; group_BV; and fp32 (B, V): the similarity of the pair in which each token was dropped, -inf for others.
    """
    (B, V, D), device = metric_BVD.shape, metric_BVD.device
    itself_BV = torch.arange(V, device=device).expand(B, V)
    group_BV, left_BV, joined_BV = itself_BV, valid_BV, metric_BVD.new_full((B, V), -torch.inf, dtype=torch.float)
    metric_BVD, size_BV = metric_BVD.float(), torch.ones(B, V, device=device)
    total_B1 = valid_BV.sum(1, keepdim=True)
    count_B1 = on(num_keep_B, metric_BVD)[:, None].minimum(total_B1)
    for done, N in enumerate(_widths(V, num_keep_B.numpy().tolist(), rounds), start=1):
        # Those left in front, so that every other one is every other column.
        index_BN, left_BN = slots(left_BV, N)
        metric_BND = take(metric_BVD, index_BN)
        index_BA, index_BC = index_BN[:, ::2], index_BN[:, 1::2]
        best_BA, choice_BA = _choices(metric_BND, left_BN)
        left_B1 = left_BV.sum(1, keepdim=True)
        aim_B1 = count_B1 + (total_B1 - count_B1) * max(rounds - done, 0) // rounds
        num_B1 = (left_B1 - aim_B1).clamp(min=0).minimum(left_B1 // 2)
        goes_BA = (rank(best_BA, left_BN[:, ::2]) < num_B1) & left_BN[:, ::2]
        to_BA = torch.where(goes_BA, index_BC.gather(1, choice_BA), index_BA)
        group_BV = itself_BV.scatter(1, index_BA, to_BA).gather(1, group_BV)
        joined_BV = joined_BV.scatter(1, index_BA, torch.where(goes_BA, best_BA, joined_BV.gather(1, index_BA)))
        left_BV = left_BV.scatter(1, index_BA, left_BN[:, ::2] & ~goes_BA)
        if average:
            join_BCA = (choice_BA[:, None] == torch.arange(N // 2, device=device)[:, None]) & goes_BA[:, None]
            share_BCA = join_BCA * size_BV.gather(1, index_BA)[:, None]
            own_BC = size_BV.gather(1, index_BC)
            more_BC = own_BC + share_BCA.sum(-1)
            sum_BCD = metric_BND[:, 1::2] * own_BC[..., None] + share_BCA @ metric_BND[:, ::2]
            size_BV = size_BV.scatter(1, index_BC, more_BC)
            metric_BVD = metric_BVD.scatter(1, index_BC[..., None].expand(-1, -1, D), sum_BCD / more_BC[..., None])
    return left_BV, group_BV, joined_BV


def _choices(metric_BND: Tensor, left_BN: Tensor) -> tuple[Tensor, Tensor]:
    """For each of set A the largest cosine (B, A) to one of set C, and which."""
    unit_BND = F.normalize(metric_BND, dim=-1)
    similar_BAC = unit_BND[:, ::2] @ unit_BND[:, 1::2].mT
    similar_BAC = similar_BAC.masked_fill(similar_BAC > 1 - SAME, 1.0)
    best = similar_BAC.masked_fill(~left_BN[:, None, 1::2], -torch.inf).max(-1)
    return best.values, best.indices


def _widths(count: int, budgets: list[int], rounds: int) -> list[int]:
    """The most tokens that any row can have at the start of each round.

    A row with fewer tokens than `count` has never more left than one with as many, nor does one with a smaller budget.
    """
    left, widths = {min(budget, count): count for budget in budgets}, []
    while any(now > budget for budget, now in left.items()):
        widths.append(max(left.values()))
        for budget, now in left.items():
            aim = budget + (count - budget) * max(rounds - len(widths), 0) // rounds
            left[budget] = max(min(aim, now), -(-now // 2))
    return widths
