"""Mix: importance and uniqueness of each token, weighed by alpha (arXiv 2502.11501, section 6)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpcompress.pruners.appliers.noise import noise_gate
from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.combinators import Composed
from tpcompress.pruners.gate_components import Choice, Scores
from tpcompress.pruners.gated import GatedPruner
from tpcompress.pruners.selectors.relaxations import soft_topk
from tpcompress.pruners.topk import keep_topk, rank, standardise

VIEWS: dict[str, frozenset[str]] = {"last_prompt": frozenset({"text"}), "last_vision": frozenset()}
"""The plain rules of uniqueness, and what they need."""

MODES = ("fixed", "scheduled", "learned")
NORMS = ("minmax", "rank", "standard")


class Mix(Composed):
    """score(v) = alpha n(importance(v)) + (1 - alpha) n(uniqueness(v)); keep = top-k.

    `importance` is a pruner, `uniqueness` another one or one of two plain rules, 1 - cos(x_v, x_last) with the last
    text token of the prompt (`last_prompt`) or the last vision token (`last_vision`). n, in each row: `minmax` to [0,
    1],
    `rank` (share of the other tokens that are not better) or `standard` (zero mean, unit deviation).
    alpha by `mode`: `fixed`; `scheduled`, in a straight line from `alpha` to `alpha_end` as training goes on, and
    `alpha_end` where no training progress is set; `learned`, one number sigmoid(a) that starts at `alpha` and is
    trained through the noise gate like a learned gate, the temperature falling from `temperature_start` to
    `temperature_end`.
    A rule that learns trains through it with its own gates, on the mixed scores; of two such rules the gates are those
    of the importance. With `norm: rank` no gradient would reach it.
    A fixed or scheduled alpha of 1 is exactly the importance rule, of 0 exactly the uniqueness rule.

    needs  what its rules need, text with last_prompt; with alpha fixed at 1 or 0, only what that rule needs.
    gives  keep_BV, scores_BV, and gate_BV and vision_BVD when alpha is trained at full length.
    Paper: FastV, last_prompt and minmax, alpha swept from 0 to 1; 0.5 is the middle of its sweep.
    Cost: one run of each rule at full budget, since its scores are read (a greedy rule then makes V picks).
    Unlike the official code: none was found. That the second term is the cosine to the last token is taken from
    reading notes. Ours: pruners as rules, last_vision, rank and standard, and an alpha that changes.
    """

    name = "mix"
    paper = "2502.11501"
    only_rank = True
    group = "combination of pruners"
    paper_plan = """
    # Importance and uniqueness at equal weight (arXiv 2502.11501): 144 of 576 tokens from layer 2 on. FastV's
    # attention, 1 - cosine to the last word, each from 0 to 1 within the image.
    stages:
      - pruner: {type: mix, alpha: 0.5}  # the paper sweeps alpha from 0 to 1
        layer: 2
        keep_tokens: 144
    """
    test_arguments = (
        {"alpha": 1.0},
        {"alpha": 0.0, "uniqueness": {"type": "novelty"}},
        {"uniqueness": "last_vision", "norm": "rank"},
        {"uniqueness": {"type": "novelty"}, "norm": "standard", "alpha": 0.3},
        {"mode": "scheduled", "alpha": 0.9, "alpha_end": 0.2},
        {"mode": "learned"},
        {"mode": "learned", "importance": {"type": "novelty"}, "uniqueness": "last_vision", "norm": "rank"},
        {"importance": {"type": "learned_gate"}, "uniqueness": "last_vision"},
        {"mode": "learned", "importance": "novelty", "uniqueness": {"type": "learned_gate", "scorer": "linear"}},
    )

    def __init__(
        self,
        importance: Pruner | str | dict[str, Any] = "fastv",
        uniqueness: Pruner | str | dict[str, Any] = "last_prompt",
        alpha: float = 0.5,
        mode: str = "fixed",
        alpha_end: float = 0.5,
        norm: str = "minmax",
        temperature_start: float = 0.5,
        temperature_end: float = 0.1,
    ) -> None:
        plain = isinstance(uniqueness, str) and uniqueness in VIEWS
        super().__init__(importance=importance, **({} if plain else {"uniqueness": uniqueness}))
        if plain:
            self.uniqueness = uniqueness
        self.part_names = ("importance",) if plain else ("importance", "uniqueness")
        for what, given, known in (("mode", mode, MODES), ("norm", norm, NORMS)):
            if given not in known:
                raise ValueError(f"mix has no {what} '{given}'; choose one of {', '.join(known)}.")
        if not (0 <= alpha <= 1 and 0 <= alpha_end <= 1) or (mode == "learned" and alpha in (0, 1)):
            raise ValueError(
                f"mix needs alpha and alpha_end in [0, 1], and alpha inside it to be learned; got {alpha}, {alpha_end}."
            )
        if not 0 < temperature_end <= temperature_start:
            raise ValueError(
                f"mix needs 0 < temperature_end <= temperature_start, got {temperature_end}, {temperature_start}."
            )
        self.alpha, self.mode, self.alpha_end, self.norm = alpha, mode, alpha_end, norm
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.differentiable = mode == "learned"
        self.progress = 1.0
        self.weight: nn.Parameter | None = None
        self.adopt()
        if mode == "learned":
            self.untrained_equivalent = None  # it would have the same weight to train
        if norm == "rank" and self.learner is not None:
            raise ValueError(
                f"mix with norm: rank passes no gradient to '{self.learner.name}'; take norm: minmax or standard."
            )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(rule.needs if isinstance(rule, Pruner) else VIEWS[rule] for rule in self._used()))

    @property
    def prompt_dependent(self) -> bool:
        return any(rule.prompt_dependent if isinstance(rule, Pruner) else bool(VIEWS[rule]) for rule in self._used())

    @property
    def learner(self) -> GatedPruner | None:
        used = [rule for rule in self._used() if isinstance(rule, GatedPruner)]
        return next((rule for rule in used if rule.learned), None)

    @property
    def learned(self) -> bool:
        return self.mode == "learned" or self.learner is not None

    def build(self, hidden_size: int) -> None:
        super().build(hidden_size)
        if self.mode == "learned" and self.weight is None:
            self.weight = nn.Parameter(torch.tensor([math.log(self.alpha / (1 - self.alpha))]))

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        self.progress = min(max(progress, 0.0), 1.0)

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        alpha = self._alpha_now()
        if alpha in (0, 1):
            return self._alone("importance" if alpha else "uniqueness", tokens, num_keep_B)
        if self.learned:
            return super().forward(tokens, num_keep_B)
        scores_BV = self._mixed(alpha, tokens, num_keep_B)
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)

    def score(self, tokens: TokenView, num_keep_B: Tensor) -> Scores:
        alpha: float | Tensor = self._alpha_now()
        if self.mode == "learned":
            assert self.weight is not None, "mix has no weight yet: attach it to a model first"
            alpha = self.weight.float().sigmoid()
        return Scores(self._mixed(alpha, tokens, num_keep_B))

    def choose(self, tokens: TokenView, scores: Scores, num_keep_B: Tensor) -> Choice:
        scores_BV = scores.scores_BV
        standard_BV = standardise(scores_BV, tokens.valid_BV)
        if self.learner is not None:
            return super().choose(tokens, replace(scores, scores_BV=standard_BV), num_keep_B)
        keep_BV = keep_topk(scores_BV, tokens.valid_BV, num_keep_B)
        if not (self.training and tokens.soft):
            return Choice(keep_BV, scores_BV)
        temperature = self.temperature_start * (self.temperature_end / self.temperature_start) ** self.progress
        return Choice(keep_BV, scores_BV, soft_topk(standard_BV / temperature, tokens.valid_BV, num_keep_B))

    def apply_gates(self, tokens: TokenView, choice: Choice) -> Selection:
        if self.learner is not None:
            return super().apply_gates(tokens, choice)
        if choice.gate_BV is None:
            return Selection(choice.keep_BV, choice.scores_BV)
        noised_BVD = noise_gate(tokens.vision_BVD, choice.gate_BV, tokens.valid_BV)
        return Selection(choice.keep_BV, choice.scores_BV, choice.gate_BV, noised_BVD)

    def _rule(self, name: str) -> Pruner | str:
        rule: Pruner | str = getattr(self, name)
        return rule

    def _used(self) -> list[Pruner | str]:
        """The rules that some alpha on the way gives a weight."""
        ends = {self.alpha} | ({self.alpha_end} if self.mode == "scheduled" else set())
        return [self._rule(name) for name, never in (("importance", {0}), ("uniqueness", {1})) if ends != never]

    def _alpha_now(self) -> float:
        if self.mode != "scheduled":
            return self.alpha
        # Not a + p (b - a), which may miss its end by rounding.
        return (1 - self.progress) * self.alpha + self.progress * self.alpha_end

    def _alone(self, name: str, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        """What one of the two rules retains without the other."""
        rule = self._rule(name)
        if isinstance(rule, Pruner):
            return self.select_with(rule, tokens, num_keep_B)
        scores_BV = unlike_last(tokens, rule)
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)

    def _mixed(self, alpha: float | Tensor, tokens: TokenView, num_keep_B: Tensor) -> Tensor:
        # A rule without a weight is left out: its views may not be there.
        terms = [("importance", alpha), ("uniqueness", 1 - alpha)]
        parts = [(name, share) for name, share in terms if isinstance(share, Tensor) or share]
        scores = [normalise(self._scores(name, tokens, num_keep_B), tokens.valid_BV, self.norm) for name, _ in parts]
        return torch.stack([share * one_BV for (_, share), one_BV in zip(parts, scores, strict=True)]).sum(0)

    def _scores(self, name: str, tokens: TokenView, num_keep_B: Tensor) -> Tensor:
        """Scores of one of the two rules; a gradient reaches them if it learns."""
        rule = self._rule(name)
        if isinstance(rule, GatedPruner) and rule.learned:
            return rule.score(self.view_of(rule, tokens), num_keep_B).scores_BV
        with torch.no_grad():
            return self.ranked(rule, tokens) if isinstance(rule, Pruner) else unlike_last(tokens, rule)


@torch.no_grad()
def unlike_last(tokens: TokenView, last: str) -> Tensor:
    """1 - cos(x_v, x_last), fp32 (B, V) in [0, 2]; 1 in a row that has no such token.

    Args:
        tokens: with text for `last_prompt`.
        last: `last_prompt`, the last text token of the prompt, or `last_vision`, the last vision token of the row.
    """
    source_BSD, there_BS = tokens.vision_BVD, tokens.valid_BV
    if last == "last_prompt":
        assert tokens.text_BSD is not None and tokens.text_role_BS is not None
        source_BSD, there_BS = tokens.text_BSD, tokens.text_role_BS > 0
    column_S = torch.arange(there_BS.shape[1], device=there_BS.device)
    index_B1 = torch.where(there_BS, column_S, 0).amax(1, keepdim=True)
    last_B1D = source_BSD.gather(1, index_B1[..., None].expand(-1, 1, source_BSD.shape[-1])).float()
    last_B1D = last_B1D.masked_fill(~there_BS.any(1)[:, None, None], 0.0)
    return 1 - F.cosine_similarity(tokens.vision_BVD.float(), last_B1D, dim=-1)


def normalise(scores_BV: Tensor, valid_BV: Tensor, norm: str) -> Tensor:
    """Scores of two rules made comparable, in each row over its valid tokens, fp32.

    Args:
        scores_BV: real numbers (B, V).
        valid_BV: bool (B, V).
        norm: `minmax` to [0, 1], `rank` for the share of the other tokens that are not better, `standard` for zero mean
            and unit deviation. Where all scores are equal: 0, 1, 0.
    """
    scores_BV = scores_BV.float()
    if norm == "standard":
        return standardise(scores_BV, valid_BV)
    if norm == "minmax":
        low_B1 = scores_BV.masked_fill(~valid_BV, torch.inf).amin(1, keepdim=True)
        high_B1 = scores_BV.masked_fill(~valid_BV, -torch.inf).amax(1, keepdim=True)
        range_B1 = (high_B1 - low_B1).clamp(min=torch.finfo(torch.float32).tiny)
        return ((scores_BV - low_B1) / range_B1).masked_fill(~valid_BV, 0.0)
    place_BV = rank(scores_BV, valid_BV)
    sorted_BV = scores_BV.gather(1, place_BV.argsort(1))
    worse_BV = F.pad(sorted_BV.diff(dim=1) != 0, (1, 0))
    column_V = torch.arange(scores_BV.shape[1], device=scores_BV.device)
    better_BV = torch.where(worse_BV, column_V, 0).cummax(1).values.gather(1, place_BV)
    others_B1 = (valid_BV.sum(1, keepdim=True) - 1).clamp(min=1)
    return (1 - better_BV / others_B1).masked_fill(~valid_BV, 0.0)
