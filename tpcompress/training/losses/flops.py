"""Penalty on the expected FLOPs of the decoder, relative to the dense decoder.

B samples, R rows of them that have vision tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tpcompress.families import Parts
from tpcompress.insertion.cost import head_size, key_width, layer_configs
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.trace import StageTrace
from tpcompress.training.losses.base import Loss, PrunedStage, Ramp, pruned_stages
from tpcompress.training.passes import Pass


def layer_cost(config: Any) -> tuple[float, float]:
    """Multiply-adds of a decoder layer, as (per token, per pair of tokens), mean over layers where they differ.

    With hidden size D, H query and G key heads of width d and MLP width M: D (2 H d + 2 G d) + 3 D M, and 2 H d.

    Args:
        config: text config; a mixture of experts counts the experts that each token is routed to.
    """
    experts, tokens, pairs = getattr(config, "num_experts_per_tok", None), 0, 0
    layers = layer_configs(config)
    for layer in layers:
        query, inner = layer.num_attention_heads * head_size(layer), layer.intermediate_size
        if experts:
            inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
        tokens += layer.hidden_size * (2 * (query + key_width(layer)) + 3 * inner)
        pairs += 2 * query
    return tokens / len(layers), pairs / len(layers)


def cost_share(length_KB: Tensor, layers_K: list[int], dense_B: Tensor, cost: tuple[float, float]) -> Tensor:
    """Share (B,) of the dense decoder's multiply-adds: sum_l (a n_l + b n_l^2) / (L (a n + b n^2)).

    Args:
        length_KB: tokens of each sample in each of K runs of layers.
        layers_K: number of layers in each run.
        dense_B: tokens without pruning.
        cost: a and b, see `layer_cost`.
    """
    a, b = cost
    work_KB = a * length_KB + b * length_KB.square()
    runs_K1 = torch.tensor(layers_K, dtype=work_KB.dtype).to(work_KB.device, non_blocking=True)[:, None]
    return (work_KB * runs_K1).sum(0) / (sum(layers_K) * (a * dense_B + b * dense_B.square()))


class Flops(Loss):
    """Squared distance between the expected share of the decoder's FLOPs and a target, mean over samples with images.

    For selectors that learn the number of retained tokens (learned budgets, thresholds). Source: DiffRate (arXiv
    2305.17997), applied to the decoder of a language model. Text tokens count, padding included.

    Args:
        target: share of the dense FLOPs, in (0, 1].
        one_sided: no penalty below the target.
        weight: factor on the term.

    Raises:
        ValueError: a target outside (0, 1].
    """

    name = "flops"
    test_arguments = ({"target": 0.2}, {"target": 0.9, "one_sided": False})

    def __init__(self, target: float = 0.5, one_sided: bool = True, weight: float | Ramp = 1.0) -> None:
        super().__init__(weight)
        if not 0 < target <= 1:
            raise ValueError(f"Loss 'flops' has target {target}; give a share of the dense FLOPs in (0, 1].")
        self.target, self.one_sided = target, one_sided
        self.cost = (1.0, 0.0)
        self.num_layers = 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gate"})

    def prepare(self, model: nn.Module, parts: Parts, plan: PruningPlan | None) -> None:
        """Read the sizes of the decoder."""
        self.cost, self.num_layers = layer_cost(parts.text_config), len(parts.layers)

    def __call__(self, student: Pass, teacher: Pass | None) -> Tensor | None:
        ran = {id(stage.trace): stage for stage in pruned_stages(student) if stage.expected() is not None}
        if not ran:
            return None
        assert student.trace is not None
        stages = student.trace.stages
        first, device = stages[0], student.targets_A.device
        seen = _per_sample(first.total, first.owner, student.num_samples)
        text_B = torch.tensor([float(first.sequence_in - n) for n in seen]).to(device, non_blocking=True)
        came_B = torch.tensor(seen, dtype=torch.float32).to(device, non_blocking=True)
        lengths, depths = [text_B + came_B], [0]
        for stage in stages:
            lengths.append(text_B + self._expected(stage, ran.get(id(stage)), student.num_samples, device))
            depths.append(stage.layer)
        runs = [end - start for start, end in zip(depths, [*depths[1:], self.num_layers], strict=True)]
        share_B = cost_share(torch.stack(lengths), runs, text_B + came_B, self.cost)
        gap_B = share_B - self.target
        gap_B = (gap_B.clamp(min=0) if self.one_sided else gap_B).square()
        return gap_B.masked_fill(came_B == 0, 0.0).sum() / sum(n > 0 for n in seen)

    def _expected(self, stage: StageTrace, pruned: PrunedStage | None, num_samples: int, device: Any) -> Tensor:
        """Expected number of vision tokens (B,) of each sample after a stage."""
        if pruned is None:
            kept = _per_sample(stage.vision_out, stage.owner, num_samples)
            return torch.tensor(kept, dtype=torch.float32).to(device, non_blocking=True)
        expected_R = pruned.expected()
        assert expected_R is not None
        owner_R = torch.tensor(stage.owner).to(device, non_blocking=True)
        return expected_R.new_zeros(num_samples).index_add(0, owner_R, expected_R.masked_fill(~pruned.real_R, 0.0))


def _per_sample(counts: list[int], owner: list[int], num_samples: int) -> list[int]:
    total = [0] * num_samples
    for count, sample in zip(counts, owner, strict=True):
        total[sample] += count
    return total
