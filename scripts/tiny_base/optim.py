"""Optimizers of the base model: Muon in fp32 for hidden matrices, AdamW for the rest, one learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Parts of the names of matrices that do not map between hidden spaces; AdamW updates them.
_NOT_HIDDEN = ("embed", "position", "table", "head")


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).

    `torch.optim.Muon` iterates in bfloat16, which is about 25 times slower on CPUs without native support.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.02, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(mean, group["momentum"])
                by_shape.setdefault(weight.shape, []).append((weight, ahead))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([ahead for _, ahead in pairs]))
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Nearly orthogonal matrices of the same row and column spaces, by Newton-Schulz iteration; (N, R, C)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Optimizers:
    """Muon and AdamW over one set of named parameters with a common learning rate."""

    def __init__(self, named: dict[str, nn.Parameter], adam_gain: float = 1.0):
        hidden = {name for name, p in named.items() if p.ndim == 2 and not any(part in name for part in _NOT_HIDDEN)}
        self.params = list(named.values())
        others = [p for name, p in named.items() if name not in hidden]
        self._adam_gain = adam_gain
        self._adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        self._muon = Muon([p for name, p in named.items() if name in hidden], lr=0.0)

    def step(self, loss: Tensor, lr: float) -> None:
        """Back-propagate, clip to norm 1 and update at a learning rate."""
        for group in self._adam.param_groups:
            group["lr"] = lr * self._adam_gain
        for group in self._muon.param_groups:
            group["lr"] = lr
        self._adam.zero_grad()
        self._muon.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self._adam.step()
        self._muon.step()

    def state_dict(self) -> dict:
        """State of both optimizers."""
        return {"adam": self._adam.state_dict(), "muon": self._muon.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore the result of `state_dict`."""
        self._adam.load_state_dict(state["adam"])
        self._muon.load_state_dict(state["muon"])


def learning_rate(step: int, steps: int, peak: float, warmup: int, flat: float) -> float:
    """Learning rate of a step: linear warm-up, a constant phase, then a cosine decay to 1 % of the peak."""
    progress = step / steps
    decay = 1.0 if progress < flat else 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - flat) / (1 - flat)))
    return peak * min(1.0, (step + 1) / warmup) * decay
