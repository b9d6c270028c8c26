"""Trains a scorer from scratch with an estimator on the toy task, whose model is frozen.

B samples, V vision tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tpcompress.insertion.plan import Budget
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.lab.estimators.catalogue import SCORER, Config, Estimator
from tpcompress.lab.estimators.toy_task import KEEP, TOKENS, WIDTH, Answered, World, answer, hard_scores, load_model
from tpcompress.pruners import Pruner, create
from tpcompress.training.losses import weighed
from tpcompress.training.passes import Pass
from tpcompress.training.schedules import progress_at

BATCH = 48
RATE = 2e-3
STEPS = (60, 240)
"""Steps after which a scorer is tested; training ends with the last."""
ENOUGH = 0.95
"""An estimator learns if, after training, this share of answers is right and this share of facts is retained."""


@dataclass(frozen=True)
class Look:
    """What a scorer is worth after some steps, on gathered tokens.

    Attributes:
        step: optimizer steps done.
        accuracy: share of right answers.
        recall: share of the facts that were retained.
    """

    step: int
    accuracy: float
    recall: float

    @property
    def enough(self) -> bool:
        """Answers and recall are high enough to count as learnt."""
        return min(self.accuracy, self.recall) >= ENOUGH


def train_scorer(
    estimator: Estimator, seed: int, steps: Sequence[int] = STEPS, scorer: str | Config = SCORER
) -> list[Look]:
    """Train a scorer and test it on the way.

    Args:
        estimator: how to train.
        seed: seed of weights, images and noise.
        steps: rising steps after which to test; the last is the end of training.
        scorer: the scorer.
    """
    model, world, generator = load_model(), World.make(), torch.Generator().manual_seed(1000 + seed)
    looks = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pruner = create(estimator.pruner(scorer)).train()
        pruner.build(WIDTH)
        losses = estimator.make_losses()
        optimizer = torch.optim.AdamW(pruner.parameters(), RATE, weight_decay=0.0)
        for step in range(steps[-1]):
            progress = progress_at(step, steps[-1])
            pruner.set_progress(progress)
            samples = world.draw(BATCH, generator)
            done = answer(model, samples, pruner, full_length=estimator.full_length(step))
            terms = weighed(losses, as_pass(done, samples.answer_B), None, progress)
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad()
            if loss.requires_grad:  # gathered steps of a mix may have no gradient for the scorer
                loss.backward()
                nn.utils.clip_grad_norm_(pruner.parameters(), 1.0)
                optimizer.step()
            if step + 1 in steps:
                looks.append(Look(step + 1, *hard_scores(model, pruner)))
    return looks


def untrained(pruner: str | Config | Pruner) -> Look:
    """The result of a pruner without training."""
    made = create(pruner if isinstance(pruner, str | Pruner) else dict(pruner))
    made.build(WIDTH)
    return Look(0, *hard_scores(load_model(), made))


def as_pass(done: Answered, answer_B: torch.Tensor) -> Pass:
    """The input of losses from a forward call: one answer token per sample."""
    B = len(answer_B)
    trace = None
    if done.selection is not None:
        stage = StageTrace(
            stage=0, layer=0, total=[TOKENS] * B, vision_in=[TOKENS] * B, vision_out=[KEEP] * B,
            sequence_in=TOKENS + 1, sequence_out=KEEP + 1, retained_RV=done.selection.keep_BV, owner=list(range(B)),
            layouts=[()] * B, view=done.view, selection=done.selection,
        )  # fmt: skip
        trace = Trace([stage])
    return Pass(
        logits_AC=done.logits_BC,
        hidden_AD=done.hidden_BD,
        targets_A=answer_B,
        sample_A=torch.arange(B),
        num_samples=B,
        trace=trace,
        budgets=[Budget(keep_tokens=KEEP)],
    )
