"""What can silently go wrong with a pruner in training, measured on a few batches that stay the same over a run.

A answer tokens, C vocabulary, R budget rows, V vision tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tpcompress.inference import inference
from tpcompress.insertion.attach import controller_of, mode
from tpcompress.insertion.trace import Trace
from tpcompress.pruners import Pruner, Selection, TokenView, create
from tpcompress.training.losses.entropy import gate_entropy
from tpcompress.training.losses.kl import kl_to_teacher
from tpcompress.training.losses.label import sample_losses
from tpcompress.training.passes import Pass, run_pass
from tpcompress.training.steps import finish, pruning

if TYPE_CHECKING:
    from tpcompress.training.module import PruningModule
    from tpcompress.training.phases import Phase

SAME_EVERYWHERE = 0.95
"""Overlap of the sets retained of different pictures from which a learned pruner is said to ignore them."""
SAME_PICTURE = 0.01
"""Relative distance of the vision tokens of two rows up to which they show the same picture."""
DRIFT = 0.1
"""Difference of the shares of right answer tokens from which training and export are said to drift apart."""


@dataclass(frozen=True)
class Findings:
    """One look at the pruner. Shares lie in [0, 1]; a nan says that there was nothing to measure.

    Attributes:
        step: optimizer steps done.
        accuracy: share of answer tokens that are right as after export: hard choices, truly shorter sequences.
        loss: mean label loss of these, nats.
        training_accuracy: the same as the phase trains: at full length, if it has such steps.
        training_kl: KL from the exported answers to those of the training mode, nats per answer token.
        random_accuracy, random_loss: as `accuracy` and `loss`, with as many tokens chosen at random.
        behind_random: label loss above that of the random choice, mean over samples, nats; negative is good.
        behind_random_error: its standard error.
        entropy: mean entropy of soft gates, bits per token: 0 is decided, 1 is undecided.
        overlap_before: Jaccard overlap of the retained sets with those of the look before, mean over rows.
        overlap_images: the same between rows of different pictures in one look.
        never_kept: share of the places in a picture that no row retains.
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
        """What should worry whoever trains; `learned` pruners alone can be blamed for their choice."""
        found = []
        if learned and self.behind_random > 2 * self.behind_random_error:
            found.append(
                f"the pruner falls under random: its answers cost {self.behind_random:.3f} nats more "
                f"(+-{self.behind_random_error:.3f}) than those of as many random tokens; it learns to drop what "
                f"matters. Take another estimator, or a warm start."
            )
        if learned and self.overlap_images > SAME_EVERYWHERE and self.never_kept > 0:
            found.append(
                f"selection ignores the image: sets retained of different pictures overlap by "
                f"{self.overlap_images:.2f}; the scorer has learnt places, not contents."
            )
        if abs(self.accuracy - self.training_accuracy) > DRIFT:
            found.append(
                f"training and export drift apart: {self.training_accuracy:.2f} of the answer tokens are right in "
                f"training mode, {self.accuracy:.2f} after export (KL {self.training_kl:.2f} nats); lower the final "
                f"temperature, or train a phase on gathered tokens."
            )
        return found

    def to_dict(self) -> dict[str, float]:
        """Plain numbers by name."""
        return asdict(self)


@dataclass(frozen=True)
class Look:
    """Findings, and the sets that the next look compares with: bool (R, V), one per probe batch."""

    findings: Findings
    retained: list[Tensor]


def look(
    module: PruningModule,
    phase: Phase,
    batches: Sequence[Mapping[str, Any]],
    before: Look | None = None,
) -> Look:
    """Measure. Nothing is trained, and random numbers and modes are afterwards as they were.

    Args:
        module: the LightningModule, its model standing, with a plan.
        phase: of the step.
        batches: the probe, on the model's device.
        before: the look before; None at the first.
    """
    model = module.model
    assert model is not None
    progress, devices = phase.progress(module.global_step), []
    if module.device.type == "cuda":
        devices = [module.device]
    with torch.random.fork_rng(devices), inference(model):
        torch.manual_seed(0)
        here, random, training = [], [], []
        for batch in batches:
            with mode(model, "drop"):
                finish(model)
                here.append(run_pass(model, batch))
                with choosing_at_random(model, here[-1].trace):
                    random.append(run_pass(model, batch))
            with pruning(module, phase, progress, full=phase.full_every > 0):
                training.append(run_pass(model, batch))
    retained = [_retained(one.trace) for one in here]
    gap, error = _paired(here, random)
    findings = Findings(
        step=module.global_step,
        accuracy=_accuracy(here),
        loss=_mean([_loss(one) for one in here]),
        training_accuracy=_accuracy(training),
        training_kl=_mean([_kl(a, b) for a, b in zip(training, here, strict=True)]),
        random_accuracy=_accuracy(random),
        random_loss=_mean([_loss(one) for one in random]),
        behind_random=gap,
        behind_random_error=error,
        entropy=_mean([_entropy(one.trace) for one in training]),
        overlap_before=math.nan if before is None else _mean(
            [float(_jaccard(a, b).mean()) for a, b in zip(retained, before.retained, strict=True) if len(a)]
        ),
        overlap_images=_mean([_between(_retained(one.trace), _other_pictures(one.trace)) for one in here]),
        never_kept=_mean([float((~one.any(0)).float().mean()) for one in retained if len(one)]),
    )  # fmt: skip
    return Look(findings, retained)


class AsMany(Pruner):
    """Random tokens, in each row as many as somebody retained; which ones does not depend on the row.

    Args:
        counts: of each row.
        seed: of the choice.
    """

    name = "as_many"
    exact_count = False

    def __init__(self, counts: list[int], seed: int) -> None:
        super().__init__()
        self.counts, self.random = torch.tensor(counts), create({"type": "random", "seed": seed})

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        selection: Selection = self.random(tokens, self.counts)
        return selection


@contextmanager
def choosing_at_random(model: nn.Module, trace: Trace | None = None) -> Iterator[None]:
    """Run a block in which every pruner that retains something gives way to a random choice of as many tokens.

    Args:
        model: with a plan.
        trace: of a call of the same batch, from which the counts of pruners are that count for themselves.
    """
    pruners, stages = controller_of(model).pruners, {} if trace is None else {one.stage: one for one in trace.stages}
    own = list(pruners)
    for number, pruner in enumerate(own):
        if not pruner.exact_count and number in stages:
            pruners[number] = AsMany(stages[number].vision_out, number).eval()
        elif not pruner.keeps_none:
            pruners[number] = create({"type": "random", "seed": number}).eval()
    try:
        yield
    finally:
        for number, pruner in enumerate(own):
            pruners[number] = pruner


def _retained(trace: Trace | None) -> Tensor:
    """bool (R, V) behind the last stage; no rows without one."""
    return trace.stages[-1].retained_RV if trace is not None and trace.stages else torch.zeros(0, 1, dtype=torch.bool)


def _jaccard(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    return (a_RV & b_RV).sum(-1) / (a_RV | b_RV).sum(-1).clamp(min=1)


def _between(retained_RV: Tensor, other_RR: Tensor) -> float:
    """Mean overlap of all pairs of rows that show different pictures; nan without such a pair."""
    pairs = _jaccard(retained_RV[:, None], retained_RV[None])[other_RR]
    return float(pairs.mean()) if len(pairs) else math.nan


def _other_pictures(trace: Trace | None) -> Tensor:
    """bool (R, R): which rows show different pictures, by the tokens that reach the first stage that looked at them.

    Data of several questions to a picture often come in order: the same tokens are rightly retained then.
    """
    asked = [stage.view for stage in trace.stages if stage.view is not None] if trace is not None else []
    if not asked:
        rows = len(_retained(trace))
        return ~torch.eye(rows, dtype=torch.bool)
    x_RVD = asked[0].vision_BVD.float().masked_fill(~asked[0].valid_BV[..., None], 0.0)
    x_RM = x_RVD.flatten(1)
    return torch.stack([(x_RM - one_M).norm(dim=1) > SAME_PICTURE * one_M.norm() for one_M in x_RM])


def _entropy(trace: Trace | None) -> float:
    """Mean entropy of the gates, bits; nan without gates that are soft: 0 and 1 do not say how sure they are."""
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
    right = sum(int((one.logits_AC.argmax(-1) == one.targets_A).sum()) for one in passes)
    return right / max(1, sum(len(one.targets_A) for one in passes))


def _loss(one: Pass) -> float:
    return float(_samples(one).mean()) if len(one.targets_A) else math.nan


def _kl(one: Pass, exported: Pass) -> float:
    return float(kl_to_teacher(one.logits_AC, exported.logits_AC)) if len(one.targets_A) else math.nan


def _samples(one: Pass) -> Tensor:
    """Mean label loss of each sample that has an answer."""
    loss_B, count_B = sample_losses(one.logits_AC, one.targets_A, one.sample_A, one.num_samples)
    return loss_B[count_B > 0]


def _paired(here: Sequence[Pass], random: Sequence[Pass]) -> tuple[float, float]:
    """Mean of the differences of the label losses sample by sample, and its standard error."""
    gaps = torch.cat([_samples(a) - _samples(b) for a, b in zip(here, random, strict=True)])
    if len(gaps) < 2:
        return math.nan, math.nan
    return float(gaps.mean()), float(gaps.std() / len(gaps) ** 0.5)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
