"""Callback that prints at the start of `fit` what a real batch becomes, and refuses a plan that prunes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from rich.console import Console

from tpcompress.data import GoodRows
from tpcompress.inference import inference
from tpcompress.insertion.effect import Effect, check_prunes, effect_of
from tpcompress.insertion.summary import si
from tpcompress.training.diagnostics.callback import is_sharded
from tpcompress.training.diagnostics.estimate import device_memory, estimate, matrix_rate
from tpcompress.training.module import PruningModule

BATCHES = 8
"""Batches of which at least one row must be shortened."""


class StartReport(L.Callback):
    """Prints vision tokens, sequence lengths, retained tokens per stage, and estimates, before the first step.

    If the plan shortens no row of the first batch, it is tried on the next rows of the data. A run in which none of
    them is shortened ends with an error.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.seen: list[Effect] = []
        self.done = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PruningModule)
        if self.done:
            return
        if is_sharded(trainer):  # ranks with and without images would call different modules
            self.done = True
            self._say(trainer, "First batch: not measured, because weights are sharded.")
            return
        self.seen.append(_effect(trainer, pl_module, batch))
        if len(self.seen) == 1:
            self._print(trainer, pl_module, batch, self.seen[0])
        if not self._prunes(trainer) and pl_module.plan is not None:
            self.seen = [_effect(trainer, pl_module, more) for more in self._next_rows(trainer)] or self.seen
            if not self._prunes(trainer) and len(self.seen) < BATCHES and self._streams(trainer):
                return  # the next batches of a stream are seen when they come
            self._refuse(trainer)
        self.done = True

    def _prunes(self, trainer: L.Trainer) -> bool:
        """Whether a row was shortened on any rank."""
        return trainer.strategy.reduce_boolean_decision(any(effect.prunes for effect in self.seen), all=False)

    def _refuse(self, trainer: L.Trainer) -> None:
        if self._prunes(trainer):
            return
        rows = sum(len(effect.lengths) for effect in self.seen)
        if not any(effect.totals for effect in self.seen):
            self._say(trainer, f"[yellow]warning:[/yellow] none of the first {rows} rows has an image to prune.")
            return
        check_prunes(self.seen, f"the first {rows} rows")

    def _streams(self, trainer: L.Trainer) -> bool:
        return getattr(trainer.datamodule, "train_rows", None) is None  # type: ignore[attr-defined]

    def _next_rows(self, trainer: L.Trainer) -> Iterator[Any]:
        """Batches of the first rows of the data; none for a stream."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows, collator = getattr(data, "train_rows", None), getattr(data, "collator", None)
        if rows is None or collator is None:
            return
        good, size = GoodRows(rows, collator.encode, "skip"), data.batch_size
        for start in range(0, min(len(rows), BATCHES * size), size):
            yield collator.pad([good[i] for i in range(start, min(start + size, len(rows)))])

    def _print(self, trainer: L.Trainer, module: PruningModule, batch: Any, effect: Effect) -> None:
        assert module.parts is not None
        for line in f"First batch: {effect}".splitlines():
            self._say(trainer, line)
        labels = batch.get("labels")
        answers = 0 if labels is None else int((labels != -100).sum())
        mixed = {"bf16": torch.bfloat16, "16": torch.float16}
        dtype = next((mixed[k] for k in mixed if str(trainer.precision).startswith(k)), module.parts.model.dtype)
        lengths = effect.layer_lengths(len(module.parts.layers))
        found = estimate(
            module.parts, module, lengths, sum(effect.images), answers, dtype, module.gradient_checkpointing
        )
        total, name = device_memory(module.device)
        listed = [(found.weights, "weights"), (found.gradients, "gradients"), (found.optimizer, "AdamW")]
        listed += [(found.activations, "activations")] if found.activations is not None else []
        parts = " + ".join(f"{si(value)}B {what}" for value, what in listed)
        self._say(
            trainer,
            f"memory, estimated by formula: {parts} = {si(found.memory)}B"
            + (f" {name} ({si(total)}B)" if total is not None else ""),
        )
        if found.flops is None:
            self._say(trainer, "step, estimated: no formula for this architecture")
            return
        rate, micro = matrix_rate(module.device, dtype), trainer.accumulate_grad_batches
        flops = found.flops * micro
        self._say(
            trainer,
            f"step, estimated by formula: {si(flops)}FLOPs per device, at least {flops / rate:.2g} s at the "
            f"{si(round(rate))}FLOP/s of a matrix product here",
        )

    def _say(self, trainer: L.Trainer, line: str) -> None:
        if trainer.is_global_zero:
            self.console.print(line, highlight=False, soft_wrap=True)


def _effect(trainer: L.Trainer, module: PruningModule, batch: Any) -> Effect:
    model: Any = module.model
    with inference(model), trainer.precision_plugin.forward_context():
        return effect_of(model, {k: v for k, v in batch.items() if k != "meta"})
