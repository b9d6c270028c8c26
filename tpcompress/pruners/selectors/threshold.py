"""Threshold: a learned level that scores must pass, so that rows count for themselves.

B rows, V tokens, Q quantiles.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpcompress.pruners.gate_components import Choice, Scores
from tpcompress.pruners.selectors.annealed import Annealed
from tpcompress.pruners.topk import on, rank

QUANTILES = 9
"""What `per_sample` sees of a row: its deciles."""


class Threshold(Annealed):
    """keep = { v : s_v > theta };     theta = z(1 - k / n) + b [+ w . deciles(s)],     gate = sigmoid((s - theta) / T).

    z is the normal quantile: with standardised scores about a share k / n lies above it, so that training starts at the
    budget whatever it is. b is learned; with `per_sample` theta is predicted for each row from the deciles of its
    scores (w starts at 0). Of the tokens that pass, the best `cap` k stay; at least `floor` k do, and one.
    T falls from `temperature_start` to `temperature_end`.

    gives  keep_BV with the number of tokens that pass; exploring also the soft gate_BV of every token, without cap and
    floor, and expected_B = its sum, for a budget loss: nothing else holds theta.
    Source: LTP (2107.00910), soft phase, there one theta per layer; `per_sample` as in ATP-LLaVA (2412.00447), of which
    no code is known. The start at the budget, cap, floor and T are ours.
    Cost: one sort of V; it chooses its own count, read by one host-device sync.
    """

    name = "threshold"
    exact_count = False
    test_arguments = (
        {"per_sample": True},
        {"cap": 1.0, "floor": 1.0},
    )

    def __init__(
        self,
        per_sample: bool = False,
        cap: float = 2.0,
        floor: float = 0.25,
        temperature_start: float = 0.5,
        temperature_end: float = 0.1,
    ) -> None:
        super().__init__(temperature_start, temperature_end)
        if not 0 <= floor <= 1 <= cap:
            raise ValueError(f"threshold needs floor in [0, 1] and cap >= 1, shares of the budget; got {floor}, {cap}.")
        self.per_sample, self.cap, self.floor = per_sample, cap, floor
        self.level: nn.Parameter | None = None
        self.slope: nn.Parameter | None = None

    @property
    def learned(self) -> bool:
        return True

    def build(self, hidden_size: int) -> None:
        if self.level is None:
            self.level = nn.Parameter(torch.zeros(()))
            self.slope = nn.Parameter(torch.zeros(QUANTILES)) if self.per_sample else None

    def forward(self, scores: Scores, valid_BV: Tensor, num_keep_B: Tensor, explore: bool) -> Choice:
        assert self.level is not None, "threshold has no weights yet: attach it to a model first"
        theta_B1 = normal_threshold(valid_BV, num_keep_B) + self.level
        if self.slope is not None:
            theta_B1 = theta_B1 + (deciles(scores.scores_BV, valid_BV) * self.slope).sum(1, keepdim=True)
        above_BV = scores.scores_BV - theta_B1
        keep_BV = within(above_BV.detach() > 0, scores.scores_BV, valid_BV, num_keep_B, self.floor, self.cap)
        if not explore:
            return Choice(keep_BV, scores.scores_BV)
        gate_BV = torch.sigmoid(above_BV / self.temperature).masked_fill(~valid_BV, 0.0)
        return Choice(keep_BV, scores.scores_BV, gate_BV, expected_B=gate_BV.sum(1))


def normal_threshold(valid_BV: Tensor, num_keep_B: Tensor) -> Tensor:
    """fp32 (B, 1): what a share k / n of normal numbers exceeds, within +- 3.1, so that a full budget stays finite."""
    count_B = valid_BV.sum(1).clamp(min=1)
    share_B = (on(num_keep_B, count_B) / count_B).clamp(1e-3, 1 - 1e-3)
    return torch.special.ndtri(1 - share_B)[:, None]


def deciles(scores_BV: Tensor, valid_BV: Tensor) -> Tensor:
    """(B, 9): the scores at a tenth, two tenths, .. of each row's order, from the best down; the nearest token."""
    sorted_BV = scores_BV.masked_fill(~valid_BV, torch.finfo(scores_BV.dtype).min).sort(dim=1, descending=True).values
    last_B1 = (valid_BV.sum(1, keepdim=True) - 1).clamp(min=0)
    tenth_Q = torch.arange(1, QUANTILES + 1, device=scores_BV.device)
    decile_BQ = sorted_BV.gather(1, (tenth_Q * last_B1 + 5) // 10)
    return decile_BQ.masked_fill(~valid_BV.any(1, keepdim=True), 0.0)


def within(
    pass_BV: Tensor, scores_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor, floor: float, cap: float
) -> Tensor:
    """bool (B, V): the best of those that pass, at most `cap` k; filled with the best others up to `floor` k, and one.

    Both are rounded to whole tokens and end at the number of valid ones.
    """
    place_BV, count_B1 = rank(scores_BV, valid_BV), on(num_keep_B, scores_BV)[:, None]
    at_most_B1, at_least_B1 = (count_B1 * cap).round(), (count_B1 * floor).round().clamp(min=1)
    return ((pass_BV & (place_BV < at_most_B1)) | (place_BV < at_least_B1)) & valid_BV
