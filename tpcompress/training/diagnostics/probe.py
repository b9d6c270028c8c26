"""Measures how well a pruner selects during training, on a few batches that stay the same over a run.

A answer tokens, C vocabulary, R budget rows, V vision tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpcompress.inference import inference
from tpcompress.insertion.attach import attachment_of, mode
from tpcompress.insertion.trace import Trace
from tpcompress.pruners import Pruner, Selection, TokenView, create
from tpcompress.pruners.combinators import Composed
from tpcompress.training.context import StepContext
from tpcompress.training.losses.entropy import gate_entropy
from tpcompress.training.losses.kl import kl_to_teacher
from tpcompress.training.losses.label import sample_losses
from tpcompress.training.passes import Pass, run_pass
from tpcompress.training.phases import Phase
from tpcompress.training.steps import pruning, set_progress_done

IGNORES_IMAGE = 0.95
"""Overlap of retained sets between different images above which a learned pruner ignores the image."""
SAME_IMAGE = 0.01
"""Relative distance of the vision tokens of two rows up to which they show the same image."""
DRIFT = 0.1
"""Difference of the token accuracy between training mode and export above which the two drift apart."""


@dataclass(frozen=True)
class Findings:
    """Measurements at one step. Shares are in [0, 1]; nan if there was nothing to measure.

    Attributes:
        step: optimizer steps done.
        accuracy: share of correct answer tokens as after export: hard selection, pruned sequence.
        loss: mean label loss as after export, nats.
        training_accuracy: accuracy in the mode of the phase: at full length, if it has such steps.
        training_kl: KL from the answers of the export mode to those of the training mode, nats per answer token.
        random_accuracy: as `accuracy`, with equally many random tokens.
        random_loss: as `loss`, with equally many random tokens.
        behind_random: label loss minus that of the random selection, mean over samples, nats; negative is good.
        behind_random_error: standard error of `behind_random`.
        entropy: mean entropy of soft gates, bits per token: 0 for decided gates, 1 for undecided ones.
        overlap_before: Jaccard overlap of the retained sets with those of the previous snapshot, mean over rows.
        overlap_images: Jaccard overlap of the retained sets between rows of different images in one snapshot.
        never_kept: share of the positions in an image that no row retains.
    """

    step: int
    accuracy: float
    loss: float
    training_accuracy: float
    training_kl: float
    random_accuracy: float
    random_loss: float
    behind_random: float
    behind_random_error: float
    entropy: float
    overlap_before: float
    overlap_images: float
    never_kept: float

    def alarms(self, learned: bool) -> list[str]:
        """Warnings about these measurements. Only a `learned` pruner is warned about its selection."""
        found = []
        if learned and self.behind_random > 2 * self.behind_random_error:
            found.append(
                f"the pruner is worse than random: its label loss is {self.behind_random:.3f} nats higher "
                f"(+-{self.behind_random_error:.3f}) than that of equally many random tokens; it learns to drop what "
                f"matters. Use another selector or applier, or a warm start with loss Imitate."
            )
        if learned and self.overlap_images > IGNORES_IMAGE and self.never_kept > 0:
            found.append(
                f"selection ignores the image: the retained sets of different images overlap by "
                f"{self.overlap_images:.2f}; the scorer has learned positions, not contents."
            )
        if abs(self.accuracy - self.training_accuracy) > DRIFT:
            found.append(
                f"training and export drift apart: {self.training_accuracy:.2f} of the answer tokens are correct in "
                f"training mode, {self.accuracy:.2f} after export (KL {self.training_kl:.2f} nats); lower the final "
                f"temperature, or train a phase on the pruned sequence."
            )
        return found

    def to_dict(self) -> dict[str, float]:
        """Plain numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class Snapshot:
    """Measurements at one step, and the retained sets that the next snapshot compares with.

    Attributes:
        findings: the measurements.
        retained: bool (R, V) per probe batch.
    """

    findings: Findings
    retained: list[Tensor]


def take_snapshot(
    ctx: StepContext,
    phase: Phase,
    batches: Sequence[Mapping[str, Any]],
    before: Snapshot | None = None,
) -> Snapshot:
    """Measure the pruner. Nothing is trained; random number generators and modes are restored.

    Args:
        ctx: the run at this step, with a plan.
        phase: phase of the step.
        batches: probe batches, on the model's device.
        before: previous snapshot; None for the first.
    """
    model = ctx.model
    progress, devices = phase.progress(ctx.step), []
    if ctx.device.type == "cuda":
        devices = [ctx.device]
    with torch.random.fork_rng(devices), inference(model):
        torch.manual_seed(0)
        exported, random, training = [], [], []
        for batch in batches:
            with mode(model, "drop"):
                set_progress_done(model)
                exported.append(run_pass(model, batch))
                with random_selection(model, exported[-1].trace):
                    random.append(run_pass(model, batch))
            with pruning(ctx, phase, progress, full=phase.full_every > 0):
                training.append(run_pass(model, batch))
    retained = [_retained(one.trace) for one in exported]
    gap, error = _paired(exported, random)
    findings = Findings(
        step=ctx.step,
        accuracy=_accuracy(exported),
        loss=_mean([_loss(one) for one in exported]),
        training_accuracy=_accuracy(training),
        training_kl=_mean([_kl(a, b) for a, b in zip(training, exported, strict=True)]),
        random_accuracy=_accuracy(random),
        random_loss=_mean([_loss(one) for one in random]),
        behind_random=gap,
        behind_random_error=error,
        entropy=_mean([_entropy(one.trace) for one in training]),
        overlap_before=math.nan if before is None else _mean(
            [float(_jaccard(a, b).mean()) for a, b in zip(retained, before.retained, strict=True) if len(a)]
        ),
        overlap_images=_mean([_between(_retained(one.trace), _other_images(one.trace)) for one in exported]),
        never_kept=_mean([float((~one.any(0)).float().mean()) for one in retained if len(one)]),
    )  # fmt: skip
    return Snapshot(findings, retained)


class RandomOfSameSize(Pruner):
    """Random tokens, with given counts per row; the ranking is the same for all rows.

    Args:
        counts: number of tokens of each row.
        seed: seed of the selection.
    """

    name = "random_of_same_size"
    exact_count = False

    def __init__(self, counts: list[int], seed: int) -> None:
        super().__init__()
        self.counts, self.random = torch.tensor(counts), create({"type": "random", "seed": seed})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        selection: Selection = self.random(tokens, self.counts)
        return selection


@contextmanager
def random_selection(model: nn.Module, trace: Trace | None = None) -> Iterator[None]:
    """Run a block in which every pruner that retains tokens is replaced by a random selection of equally many tokens.

    A combinator that merges still does, around a random choice: what is compared is the choice.

    Args:
        model: model with a plan.
        trace: trace of a call on the same batch, for the counts of pruners with a variable budget.
    """
    pruners, stages = attachment_of(model).pruners, {} if trace is None else {one.stage: one for one in trace.stages}
    own = list(pruners)
    for number, pruner in enumerate(own):
        if not pruner.exact_count and number in stages:
            pruners[number] = RandomOfSameSize(stages[number].vision_out, number).eval()
        elif not pruner.keeps_none:
            pruners[number] = _random_like(pruner, number).eval()
    try:
        yield
    finally:
        for number, pruner in enumerate(own):
            pruners[number] = pruner


def _random_like(pruner: nn.Module, seed: int) -> Pruner:
    """A random pruner; one that merges as the given combinator does, if that is one."""
    chance = {"type": "random", "seed": seed}
    if isinstance(pruner, Composed) and pruner.merges:
        return create(pruner.config() | {name: dict(chance) for name in pruner.part_names})
    return create(chance)


def _retained(trace: Trace | None) -> Tensor:
    """Retained tokens after the last stage, bool (R, V); no rows without a stage."""
    return trace.stages[-1].retained_RV if trace is not None and trace.stages else torch.zeros(0, 1, dtype=torch.bool)


def _jaccard(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    return (a_RV & b_RV).sum(-1) / (a_RV | b_RV).sum(-1).clamp(min=1)


def _between(retained_RV: Tensor, other_RR: Tensor) -> float:
    """Mean overlap over all pairs of rows with different images; nan without such a pair."""
    pairs = _jaccard(retained_RV[:, None], retained_RV[None])[other_RR]
    return float(pairs.mean()) if len(pairs) else math.nan


def _other_images(trace: Trace | None) -> Tensor:
    """Pairs of rows with different images, bool (R, R), compared by the vision tokens at the first stage that ran.

    Several questions about one image often follow each other in a data set; retaining equal sets is correct then.
    """
    views = [stage.view for stage in trace.stages if stage.view is not None] if trace is not None else []
    if not views:
        rows = len(_retained(trace))
        return ~torch.eye(rows, dtype=torch.bool)
    x_RVD = views[0].vision_BVD.float().masked_fill(~views[0].valid_BV[..., None], 0.0)
    x_RM = x_RVD.flatten(1)
    return torch.stack([(x_RM - one_M).norm(dim=1) > SAME_IMAGE * one_M.norm() for one_M in x_RM])


def _entropy(trace: Trace | None) -> float:
    """Mean entropy of soft gates, bits; nan without soft gates, because hard gates have entropy 0 by definition."""
    found = []
    for stage in trace.stages if trace is not None else []:
        if stage.selection is None or stage.view is None or stage.selection.gate_BV is None:
            continue
        gate = stage.selection.gate_BV.float()
        if ((gate == 0) | (gate == 1)).all():
            continue
        bits = gate_entropy(gate)
        found.append(float(bits.masked_fill(~stage.view.valid_BV, 0.0).sum() / stage.view.valid_BV.sum().clamp(min=1)))
    return _mean(found)


def _accuracy(passes: Sequence[Pass]) -> float:
    correct = sum(int((one.logits_AC.argmax(-1) == one.targets_A).sum()) for one in passes)
    return correct / max(1, sum(len(one.targets_A) for one in passes))


def _loss(one: Pass) -> float:
    return float(_samples(one).mean()) if len(one.targets_A) else math.nan


def _kl(one: Pass, exported: Pass) -> float:
    return float(kl_to_teacher(one.logits_AC, exported.logits_AC)) if len(one.targets_A) else math.nan


def _samples(one: Pass) -> Tensor:
    """Label loss of each sample that has an answer, mean over its tokens."""
    loss_B, count_B = sample_losses(one.logits_AC, one.targets_A, one.sample_A, one.num_samples)
    return loss_B[count_B > 0]


def _paired(exported: Sequence[Pass], random: Sequence[Pass]) -> tuple[float, float]:
    """Mean difference of the label losses over samples, and its standard error."""
    gaps = torch.cat([_samples(a) - _samples(b) for a, b in zip(exported, random, strict=True)])
    if len(gaps) < 2:
        return math.nan, math.nan
    return float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
