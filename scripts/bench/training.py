"""What a training step costs: dense, at full length with tokens hidden (mode `mask`), and gathered (mode `drop`).

A step is forward, label loss, backward and optimizer, as training runs it. Only the language part counts: images are
encoded once beforehand and given as `mm_encoder_outputs`.
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
from tpcompress.training.losses.label import label_loss
from tpcompress.training.optim import group_of
from tpcompress.training.passes import run_pass
from tpcompress.training.trainable import add_lora

ADAPT = ("lora", "full")
MODES = {"masked": "mask", "gathered": "drop"}
ANSWER = 16
"""Words at the end of each sample that are answers."""
LIMIT = 0.45
"""A gathered step at a ninth of the vision tokens may take this share of a dense one, beyond noise."""
LORA = {"r": 16, "lora_alpha": 32}


@dataclass(frozen=True)
class Arm:
    """One way to train the same weights on the same batch.

    Attributes:
        name: dense, masked or gathered.
        keep: vision tokens that a stage before the language model keeps; None for dense.
        step: one step of training.
    """

    name: str
    keep: int | None
    step: Run


@dataclass(frozen=True)
class Work:
    """What is trained in a benchmark.

    Attributes:
        adapt: lora or full.
        shape: sizes of the model and of a prompt.
        batch_size: samples of a step.
        checkpointing: decoder layers are recomputed in the backward pass.
        device, dtype, attention: of the model.
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
            raise ValueError(f"A step trains by one of {', '.join(ADAPT)}, got {self.adapt!r}.")
        if self.batch_size < 1 or self.shape.text // 2 < ANSWER + 2:
            least = 2 * (ANSWER + 2)
            raise ValueError(f"A step needs a sample and {least} words, got {self.batch_size} and {self.shape.text}.")

    @property
    def tokens(self) -> int:
        """Tokens of a batch as it comes, before any stage."""
        return self.batch_size * (self.shape.side**2 + self.shape.text)


def make_arms(work: Work, keeps: Sequence[int], pruner: Any = "uniform") -> list[Arm]:
    """The dense step, then the masked and the gathered one at every budget; all share weights and optimizer.

    Args:
        work: what is trained.
        keeps: vision tokens that a stage keeps.
        pruner: name or config of a pruner without weights.

    Raises:
        ValueError: a budget that leaves nothing to drop.
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
        """One step; the label loss of its forward pass."""
        with torch.enable_grad():
            here = run_pass(self.model, self.batch)
            loss = label_loss(here.logits_AC, here.targets_A)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _batch(base: Any, attached: Any, work: Work) -> dict[str, Any]:
    """Samples of one encoded picture each and the same words, whose last ones are answers."""
    side, pixels = work.shape.side, 14 * work.shape.side
    with torch.no_grad():
        picture = torch.randn(work.batch_size, 3, pixels, pixels, device=work.device, dtype=work.dtype)
        # By an attached model, which notes how the tokens lie; they are the same without a plan.
        encoded = attached.get_image_features(pixel_values=picture, return_dict=True)
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
    """One arm, measured.

    Attributes:
        arm: which.
        seconds: median time of a step, by the clock that was asked for.
        tokens_per_second: of the batch as it came, whatever the stage dropped.
        ratio: to the dense step of the same round.
        flops: of the matrix products of a step, forward and backward.
        peak: bytes beyond weights and optimizer state.
        vision_tokens: of one image.
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
        """A gathered step at a ninth or less is within `LIMIT` of a dense one, or noise cannot tell."""
        counts = self.arm.name == "gathered" and 9 * (self.arm.keep or 0) <= self.vision_tokens
        return not counts or self.ratio.low <= LIMIT


def measure(work: Work, arms: Sequence[Arm], repeats: int, clock: str) -> list[Measured]:
    """Time all arms in turns, then count and weigh them.

    Args:
        work: what is trained.
        arms: the dense one first.
        repeats: rounds.
        clock: `cpu` for the time that the process computes, `wall` for a GPU.
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
