"""Train a stage until it reaches the required accuracy: resumable steps, then extra steps, then the next seed."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console
from torch import Tensor, nn

from tiny_base.optim import Optimizers, learning_rate

_SMOOTHING = 0.97


@dataclass(frozen=True)
class Budget:
    """Training length and required accuracy of a stage.

    Attributes:
        flat: fraction of the steps at the peak learning rate.
        extension: steps added, at half the learning rate, if a family is below its gate.
        extensions: maximum number of such additions.
        attempts: maximum number of seeds.
        gate: required accuracy of every family in percent.
        gates: (family, percent) pairs that override `gate`.
        exam: number of held-out images of the test against the gate.
    """

    steps: int
    lr: float
    warmup: int = 50
    flat: float = 0.5
    extension: int = 200
    extensions: int = 2
    attempts: int = 3
    gate: float = 95.0
    gates: tuple[tuple[str, float], ...] = ()
    report_every: int = 100
    save_every: int = 50
    exam: int = 512

    def missed(self, scores: dict[str, float]) -> dict[str, float]:
        """Families below their gate."""
        floors = dict(self.gates)
        return {family: score for family, score in scores.items() if score < floors.get(family, self.gate)}


class Learner(Protocol):
    """State of a stage for one seed: its modules, and losses that depend on the step number only."""

    modules: nn.Module
    optimizers: Optimizers

    def loss(self, step: int, steps: int) -> Tensor:
        """Loss of a step on images that no other step uses."""

    def evaluate(self, images: int) -> dict[str, float]:
        """Accuracy per family in percent on held-out images."""


class Stage(Protocol):
    """A named training stage."""

    name: str

    def learner(self, seed: int) -> Learner:
        """Create the learner of a seed."""


def run_stage(stage: Stage, budget: Budget, seed: int, work: Path, console: Console) -> Learner:
    """Train a stage until every family passes its gate; resumes from the checkpoint if there is one.

    Raises:
        RuntimeError: no attempt passes.
    """
    missed: dict[str, float] = {}
    for attempt in range(budget.attempts):
        run = _Run(stage, budget, seed + attempt, work, console)
        missed = run.finish()
        if not missed:
            return run.learner
    raise RuntimeError(
        f"Stage {stage.name!r} missed its gate with seeds {seed}-{seed + budget.attempts - 1}: {missed} percent after "
        f"every extension; increase its steps or use another --seed."
    )


class _Run:
    """One attempt at a stage with its checkpoint file."""

    def __init__(self, stage: Stage, budget: Budget, seed: int, work: Path, console: Console):
        self.learner = stage.learner(seed)
        self._budget, self._console = budget, console
        self._title = f"{stage.name} seed {seed}"
        self._path = work / f"{stage.name}-{seed}.pt"
        self._progress: dict = {"cycle": 0, "step": 0, "total": 0, "cpu_s": 0.0, "average": None, "missed": None}
        if self._path.exists():
            self._restore()
        self._clock = time.process_time()

    def finish(self) -> dict[str, float]:
        """Train, extend while a family is below its gate, and return the families that still are."""
        progress, budget = self._progress, self._budget
        while True:
            if progress["missed"] is None:
                self._train(budget.extension if progress["cycle"] else budget.steps)
                scores = self.learner.evaluate(budget.exam)
                progress["missed"] = budget.missed(scores)
                self._save()
                self._report(scores, "MISSED " + ", ".join(progress["missed"]) if progress["missed"] else "passed")
            if not progress["missed"] or progress["cycle"] == budget.extensions:
                return progress["missed"]
            progress.update(cycle=progress["cycle"] + 1, step=0, missed=None)

    def _train(self, steps: int) -> None:
        progress, budget = self._progress, self._budget
        peak = budget.lr * (0.5 if progress["cycle"] else 1.0)
        self.learner.modules.train()
        while progress["step"] < steps:
            loss = self.learner.loss(progress["total"], budget.steps)
            rate = learning_rate(progress["step"], steps, peak, budget.warmup, budget.flat)
            self.learner.optimizers.step(loss, rate)
            value, average = loss.item(), progress["average"]
            progress["average"] = value if average is None else _SMOOTHING * average + (1 - _SMOOTHING) * value
            progress["step"] += 1
            progress["total"] += 1
            if progress["total"] % budget.report_every == 0:
                self._report(self.learner.evaluate(128), "")
                self.learner.modules.train()
            if progress["total"] % budget.save_every == 0:
                self._save()

    def _report(self, scores: dict[str, float], verdict: str) -> None:
        self._tick()
        progress = self._progress
        shown = " ".join(f"{family} {score:.1f}" for family, score in scores.items())
        head = f"{self._title} step {progress['total']} cpu {progress['cpu_s']:.0f}s"
        self._console.print(f"{head} loss {progress['average'] or 0.0:.4f} {shown} {verdict}", highlight=False)

    def _tick(self) -> None:
        now = time.process_time()
        self._progress["cpu_s"] += now - self._clock
        self._clock = now

    def _save(self) -> None:
        self._tick()
        state = {
            "progress": self._progress,
            "modules": self.learner.modules.state_dict(),
            "optimizers": self.learner.optimizers.state_dict(),
        }
        partial = self._path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self._path)

    def _restore(self) -> None:
        state = torch.load(self._path, weights_only=True)
        self._progress = state["progress"]
        self.learner.modules.load_state_dict(state["modules"])
        self.learner.optimizers.load_state_dict(state["optimizers"])
        self._console.print(f"{self._title}: continues at step {self._progress['total']}", highlight=False)
