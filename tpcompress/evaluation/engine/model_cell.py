"""A cell that tests a model: the base or a trained one, dense or pruned, with its own or another pruner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.engine.cell import Cell, Made, Run
from tpcompress.evaluation.engine.fingerprint import code_digest
from tpcompress.insertion.attach import attach, detach
from tpcompress.insertion.plan import PruningPlan, Stage


@dataclass(frozen=True, eq=False)
class ModelCell(Cell):
    """One model, tested once.

    Attributes:
        plan: plan of the test; None tests without pruning.
        run: training run of the model; None is the base.
        gate: training run whose trained pruner replaces that of the plan's last stage; None leaves it.
        blank: images are blanked.
    """

    plan: PruningPlan | None = None
    run: Run | None = None
    gate: Run | None = None
    blank: bool = False

    @property
    def runs(self) -> list[Run]:
        """The runs of model and pruner."""
        return list({run.name: run for run in (self.run, self.gate) if run is not None}.values())

    def key(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Shared settings, plan with all arguments, source code of its pruners, runs, blank images."""
        return {
            **common,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "code": code_digest(self.plan),
            "model": None if self.run is None else self.run.name,
            "gate": None if self.gate is None else self.gate.name,
            "blank": self.blank,
        }

    @contextmanager
    def model(self, bench: Bench) -> Iterator[nn.Module]:
        """The model of the cell with its plan attached; dense again afterwards."""
        plan, model = self.plan, bench.model
        if self.gate is not None and plan is not None:
            stage, pruner = plan.stages[-1], bench.trained(self.gate).pruner
            if pruner is None:
                raise ValueError(f"The run {self.gate.name} has no pruner; it trains the dense model.")
            trained = Stage(pruner, stage.layer, stage.keep_ratio, stage.keep_tokens)
            plan = PruningPlan([*plan.stages[:-1], trained], plan.positions, plan.scope)
        if self.run is not None:
            model = bench.trained(self.run).model
        if plan is None:
            yield model
            return
        attach(model, plan)
        try:
            yield model
        finally:
            detach(model)

    def make(self, bench: Bench) -> Made:
        """Test the model."""
        with self.model(bench) as model:
            return Made(scores=bench.test(model, self.blank))
