"""Callback that measures the pruner during training, logs the measurements, and prints warnings at the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from rich.console import Console

from tpcompress.insertion.plan import PruningPlan
from tpcompress.pruners.learned_gate import LearnedGate
from tpcompress.training.diagnostics.estimator_results import DOES_NOT_LEARN, mark_of, training_of
from tpcompress.training.diagnostics.probe import Snapshot, take_snapshot
from tpcompress.training.module import PruningModule
from tpcompress.training.phases import is_learned

FILE = "diagnostics.json"


class Diagnostics(L.Callback):
    """Compares training with export, and the pruner's selection with a random one, on the same batches over a run.

    Measurements are logged as `diagnostics/<name>` and written, with their alarms, to `diagnostics.json` in the run's
    folder. The probe is the first validation batches, or without validation data the first training batches. Disabled
    for sharded weights (FSDP, ZeRO-3), where all ranks would have to take part.

    Args:
        every: optimizer steps between two snapshots; one is also taken at the end of each phase. 0 disables them.
        batches: number of probe batches.

    Raises:
        ValueError: negative numbers, or a probe without batches.
    """

    def __init__(self, every: int = 200, batches: int = 2) -> None:
        if every < 0 or batches < 1:
            raise ValueError(f"diagnostics needs every >= 0 and batches >= 1, got {every} and {batches}.")
        self.every, self.batches = every, batches
        self.console = Console(stderr=True)
        self.probe: list[Any] = []
        self.last: Snapshot | None = None
        self.history: list[dict[str, float | None]] = []
        self.alarms: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, PruningModule)
        for warning in known_not_to_learn(pl_module) if trainer.is_global_zero else []:
            self.console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False, soft_wrap=True)
        self.active = self.every > 0 and getattr(pl_module, "plan", None) is not None and not is_sharded(trainer)
        loaders: Any = trainer.datamodule.val_dataloader() if self.active and _has_val(trainer) else []  # type: ignore[attr-defined]
        for batch in loaders or []:
            self.probe.append(batch)
            if len(self.probe) == self.batches:
                break

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The first snapshot fixes the probe, because later ones are compared with it.
        if self.active and len(self.probe) < self.batches and self.last is None and not _has_val(trainer):
            self.probe.append(batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PruningModule)
        step = trainer.global_step
        if not self.active or not self.probe or (self.last is not None and self.last.findings.step == step):
            return
        # At the end of a phase the snapshot is taken in the mode of that phase.
        over = next((phase for phase in pl_module.phases if phase.end == step), None)
        if over is None and (step == 0 or step % self.every):
            return
        batches = [pl_module.transfer_batch_to_device(one, pl_module.device, 0) for one in self.probe]
        with trainer.precision_plugin.forward_context():  # callbacks run outside of autocast
            self.last = take_snapshot(pl_module.context, over or pl_module.phase, batches, self.last)
        found = self.last.findings.to_dict()
        pl_module.log_dict({f"diagnostics/{k}": float(v) for k, v in found.items() if k != "step"}, batch_size=1)
        self.alarms = self.last.findings.alarms(is_learned(pl_module.plan))
        self.history = [one for one in self.history if one["step"] != step]  # a resumed run may repeat a step
        self.history.append({k: None if math.isnan(v) else v for k, v in found.items()})
        if trainer.is_global_zero:
            self._write(Path(trainer.default_root_dir))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            for alarm in self.alarms:
                self.console.print(f"[bold red]ALARM[/bold red] {alarm}", highlight=False, soft_wrap=True)

    def state_dict(self) -> dict[str, Any]:
        """Snapshots and alarms so far."""
        return {"history": self.history, "alarms": self.alarms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the snapshots of the interrupted run."""
        self.history, self.alarms = list(state_dict["history"]), list(state_dict["alarms"])

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps({"looks": self.history, "alarms": self.alarms}, indent=1) + "\n")


def known_not_to_learn(module: PruningModule) -> list[str]:
    """Warnings for selectors and appliers that did not learn in the estimator measurements.

    Empty for recipes with `reproduction: true`, which repeat published settings including their defects.
    """
    gates = estimators_of(module.plan) if module.plan else []
    found = [
        f"{selector} with {applier}, {training_of(phase.full_every)}, did not train a scorer in "
        f"`tpcompress estimators`; use another selector or applier, or set model.reproduction: true."
        for phase in module.phases
        for selector, applier in gates
        if phase.pruner and mark_of(selector, applier, phase.full_every) == DOES_NOT_LEARN
    ]
    return [] if module.reproduction else found


def estimators_of(plan: PruningPlan) -> list[tuple[str, str]]:
    """Selector and applier of every learned gate of a plan, also of one inside a combinator.

    Where a combinator merges and the gates do not act at full length, they act as those of the applier `merge`.
    """
    gates = [(stage.pruner, m) for stage in plan.stages for m in stage.pruner.modules() if isinstance(m, LearnedGate)]
    return [
        (
            gate.selector.name,
            "merge" if outer.merges and gate.trainable_when_cut and outer is not gate else gate.applier.name,
        )
        for outer, gate in gates
    ]


def _has_val(trainer: L.Trainer) -> bool:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return getattr(data, "val_rows", None) is not None


def is_sharded(trainer: L.Trainer) -> bool:
    """Whether weights are split over ranks, so that all of them must call the same modules."""
    strategy = trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) or (
        isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    )
