"""A budget in operations instead of tokens: how much of the dense decoder's work is expected to remain.

B samples, R rows of them that have vision tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.trace import StageTrace
from tpcompress.training.losses.base import Chosen, Loss, Ramp, chosen_stages
from tpcompress.training.passes import Pass


def layer_cost(config: Any) -> tuple[float, float]:
    """Multiply-adds of a decoder layer, as (per token, per pair of tokens).

    With hidden size D, H query and G key heads of width d and MLP width M: D (2 H d + 2 G d) + 3 D M, and 2 H d.

    Args:
        config: of the language model; experts count as many times as a token visits one.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or width // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    experts = getattr(config, "num_experts_per_tok", None)
    inner = config.intermediate_size
    if experts:
        inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
    return float(width * 2 * (heads + keys) * size + 3 * width * inner), float(2 * heads * size)


def cost_share(length_KB: Tensor, layers_K: list[int], dense_B: Tensor, cost: tuple[float, float]) -> Tensor:
    """Share (B,) of the dense decoder's work that is left: sum_l (a n_l + b n_l^2) / (L (a n + b n^2)).

    Args:
        length_KB: tokens of each sample in each of K runs of layers.
        layers_K: how many layers each run has.
        dense_B: tokens without pruning.
        cost: a and b, see `layer_cost`.
    """
    a, b = cost
    work_KB = a * length_KB + b * length_KB.square()
    runs_K1 = torch.tensor(layers_K, dtype=work_KB.dtype).to(work_KB.device, non_blocking=True)[:, None]
    return (work_KB * runs_K1).sum(0) / (sum(layers_K) * (a * dense_B + b * dense_B.square()))


class Flops(Loss):
    """Squared distance of the expected share of the decoder's work from a target, mean over samples with pictures.

    For selectors that learn how many tokens stay: learned budgets and thresholds. Source: DiffRate (arXiv 2305.17997),
    for the decoder of a language model; text counts, padded as the batch is.

    Args:
        target: share, in (0, 1], of the work without pruning.
        one_sided: cost nothing below the target.
        weight: of the term.

    Raises:
        ValueError: a target outside (0, 1].
    """

    name = "flops"

    def __init__(self, target: float = 0.5, one_sided: bool = True, weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        if not 0 < target <= 1:
            raise ValueError(f"Loss 'flops' has target {target}; give a share of the work, in (0, 1].")
        self.target, self.one_sided = target, one_sided
        self.cost = (1.0, 0.0)
        self.num_layers = 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def prepare(self, module: Any) -> None:
        """Read the widths of the decoder."""
        self.cost, self.num_layers = layer_cost(module.parts.text_config), len(module.parts.layers)

    def __call__(self, here: Pass, taught: Pass | None) -> Tensor | None:
        asked = {id(stage.trace): stage for stage in chosen_stages(here) if stage.expected() is not None}
        if not asked:
            return None
        assert here.trace is not None
        stages = here.trace.stages
        first, device = stages[0], here.targets_A.device
        seen = _per_sample(first.total, first.owner, here.num_samples)
        text_B = torch.tensor([float(first.sequence_in - n) for n in seen]).to(device, non_blocking=True)
        came_B = torch.tensor(seen, dtype=torch.float32).to(device, non_blocking=True)
        lengths, depths = [text_B + came_B], [0]
        for stage in stages:
            lengths.append(text_B + self._expected(stage, asked.get(id(stage)), here.num_samples, device))
            depths.append(stage.layer)
        runs = [end - start for start, end in zip(depths, [*depths[1:], self.num_layers], strict=True)]
        share_B = cost_share(torch.stack(lengths), runs, text_B + came_B, self.cost)
        gap_B = share_B - self.target
        gap_B = (gap_B.clamp(min=0) if self.one_sided else gap_B).square()
        return gap_B.masked_fill(came_B == 0, 0.0).sum() / sum(n > 0 for n in seen)

    def _expected(self, stage: StageTrace, chosen: Chosen | None, num_samples: int, device: Any) -> Tensor:
        """Vision tokens (B,) of each sample behind a stage."""
        if chosen is None:
            kept = _per_sample(stage.vision_out, stage.owner, num_samples)
            return torch.tensor(kept, dtype=torch.float32).to(device, non_blocking=True)
        expected_R = chosen.expected()
        assert expected_R is not None
        owner_R = torch.tensor(stage.owner).to(device, non_blocking=True)
        return expected_R.new_zeros(num_samples).index_add(0, owner_R, expected_R.masked_fill(~chosen.real_R, 0.0))


def _per_sample(counts: list[int], owner: list[int], num_samples: int) -> list[int]:
    total = [0] * num_samples
    for count, sample in zip(counts, owner, strict=True):
        total[sample] += count
    return total
