"""Measure the cost of a training step: dense, masked at full length (mode `mask`), and gathered (mode `drop`).

A step is forward, label loss, backward and optimizer, as in training. Only the language part is timed: images are
encoded once beforehand and passed as `mm_encoder_outputs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.models import MODELS, Shape, prompt, sharing_copy
from bench.prefill import Ratio, Run, flops, interleaved, peak_bytes
from tpcompress.data.encode import IGNORED
from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, base_of
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.training.adapters import add_lora
from tpcompress.training.losses.label import label_loss
from tpcompress.training.optim import group_of
from tpcompress.training.passes import run_pass

ADAPT = ("lora", "full")
MODES = {"masked": "mask", "gathered": "drop"}
ANSWER = 16
"""Answer tokens at the end of each sample."""
LIMIT = 0.45
"""Maximum ratio of a gathered step at a ninth of the vision tokens to a dense step, apart from noise."""
LORA = {"r": 16, "lora_alpha": 32}


@dataclass(frozen=True)
class Arm:
    """One variant of a training step, with the same weights and batch.

    Attributes:
        name: dense, masked or gathered.
        keep: vision tokens retained before the language model; None for dense.
        step: one training step.
    """

    name: str
    keep: int | None
    step: Run


@dataclass(frozen=True)
class Work:
    """Settings of the training steps.

    Attributes:
        adapt: lora or full.
        shape: sizes of model and prompt.
        batch_size: samples per step.
        checkpointing: recompute decoder layers in the backward pass.
        device, dtype, attention: settings of the model.
    """

    adapt: str = "lora"
    shape: Shape = Shape()
    batch_size: int = 2
    checkpointing: bool = False
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        if self.adapt not in ADAPT:
            raise ValueError(f"adapt must be one of {', '.join(ADAPT)}, got {self.adapt!r}.")
        if self.batch_size < 1 or self.shape.text // 2 < ANSWER + 2:
            least = 2 * (ANSWER + 2)
            raise ValueError(
                f"batch_size must be at least 1 and text at least {least}, got {self.batch_size} and {self.shape.text}."
            )

    @property
    def tokens(self) -> int:
        """Tokens of a batch before pruning."""
        return self.batch_size * (self.shape.side**2 + self.shape.text)


def make_arms(work: Work, keeps: Sequence[int], pruner: Any = "uniform") -> list[Arm]:
    """Create the dense step, and a masked and a gathered step for every budget; all share weights and optimizer.

    Args:
        work: settings of the steps.
        keeps: retained vision tokens.
        pruner: name or config of a pruner without weights.

    Raises:
        ValueError: a budget that drops nothing.
    """
    total = work.shape.side**2
    if not keeps or max(keeps) >= total:
        raise ValueError(f"keep {max(keeps, default=0)} of {total} vision tokens drops nothing; choose fewer.")
    torch.manual_seed(0)
    model: Any = MODELS["llava"](work.shape, work.attention)
    model.to(work.device, work.dtype).requires_grad_(False)
    base = model
    if work.checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    parts = resolve(model)
    if work.adapt == "lora":
        model = add_lora(model, dict(LORA), parts, set())
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(group_of(name, parts) == "language_model")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    plans = {keep: PruningPlan([Stage(pruner, keep_tokens=keep)]) for keep in keeps}
    copies = {(name, keep): sharing_copy(model) for keep in keeps for name in MODES}
    for (name, keep), copy in copies.items():
        attach(copy, plans[keep], MODES[name])
    batch = _batch(base, base_of(next(iter(copies.values()))), work)
    arms = [Arm("dense", None, _Step(model.train(), batch, optimizer))]
    return arms + [Arm(name, keep, _Step(copy.train(), batch, optimizer)) for (name, keep), copy in copies.items()]


@dataclass(frozen=True)
class _Step:
    model: nn.Module
    batch: dict[str, Any]
    optimizer: torch.optim.Optimizer

    def __call__(self) -> Tensor:
        """Run one step and return its label loss."""
        with torch.enable_grad():
            here = run_pass(self.model, self.batch)
            loss = label_loss(here.logits_AC, here.targets_A)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _batch(base: Any, attached: Any, work: Work) -> dict[str, Any]:
    """A batch of samples with one encoded image each and the same text, which ends with the answer."""
    side, pixels = work.shape.side, 14 * work.shape.side
    with torch.no_grad():
        images = torch.randn(work.batch_size, 3, pixels, pixels, device=work.device, dtype=work.dtype)
        # Encoded by an attached model, which records the layouts; the features do not depend on the plan.
        encoded = attached.get_image_features(pixel_values=images, return_dict=True)
        ids_BS = prompt(base, work.shape, side, side, encoded)["input_ids"].repeat(work.batch_size, 1)
    labels_BS = torch.full_like(ids_BS, IGNORED)
    labels_BS[:, -ANSWER:] = ids_BS[:, -ANSWER:]
    return {
        "input_ids": ids_BS,
        "attention_mask": torch.ones_like(ids_BS),
        "labels": labels_BS,
        "mm_encoder_outputs": {"image": encoded},
    }


# ------------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Measured:
    """Measurements of one arm.

    Attributes:
        arm: the arm.
        seconds: median time of a step.
        tokens_per_second: throughput in tokens before pruning.
        ratio: time relative to the dense step of the same round.
        flops: FLOPs of the matrix products of a step, forward and backward.
        peak: peak memory in bytes, without weights and optimizer state.
        vision_tokens: vision tokens of one image.
    """

    arm: Arm
    seconds: float
    tokens_per_second: float
    ratio: Ratio
    flops: int
    peak: int
    vision_tokens: int

    @property
    def ok(self) -> bool:
        """A gathered step at a ninth of the tokens or less is not significantly above `LIMIT`."""
        counts = self.arm.name == "gathered" and 9 * (self.arm.keep or 0) <= self.vision_tokens
        return not counts or self.ratio.low <= LIMIT


def measure(work: Work, arms: Sequence[Arm], repeats: int, clock: str) -> list[Measured]:
    """Time all arms in turns, then measure FLOPs and peak memory.

    Args:
        work: settings of the steps.
        arms: arms, with the dense one first.
        repeats: rounds.
        clock: `cpu` for processor time, `wall` for a GPU.
    """
    taken = [[getattr(s, clock) for s in arm] for arm in interleaved([arm.step for arm in arms], repeats)]
    medians = [float(np.median(seconds)) for seconds in taken]
    return [
        Measured(
            arm=arm,
            seconds=median,
            tokens_per_second=work.tokens / median,
            ratio=Ratio.of(seconds, taken[0]),
            flops=flops(arm.step),
            peak=peak_bytes(arm.step, work.device),
            vision_tokens=work.shape.side**2,
        )
        for arm, median, seconds in zip(arms, medians, taken, strict=True)
    ]
