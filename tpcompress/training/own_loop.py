"""Training in other loops than `tpcompress fit`: learned pruners, budget schedules, transformers' Trainer and TRL's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tpcompress.insertion.attach import attachment_of, base_of, budgets, is_attached, layers, record
from tpcompress.insertion.trace import Trace
from tpcompress.training.schedules import Schedule, draw_for, progress_at
from tpcompress.training.step_values import step_budgets, step_layers

PARTS = ("all", "pruner", "rest")

_frozen: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()
"""Weights that `trainable(model, "pruner")` froze, by base model."""


def trainable(model: nn.Module, what: str = "all") -> list[nn.Parameter]:
    """Choose what an attached model trains, and put learned pruners in the mode in which they learn.

    A learned pruner gets its gradient through gates at full length, from every forward call in train mode; in eval mode
    the sequence is cut. A pruner whose weights are frozen selects as it will in the export. Run it after PEFT has
    wrapped the model, and before the optimizer is created:

        tp.attach(model, "learned_gate", keep_tokens=64)
        optimizer = AdamW(tp.trainable(model, "pruner"), lr=1e-3)  # phase one: the pruner alone, at full length
        ...
        optimizer = AdamW(tp.trainable(model, "rest"), lr=1e-5)    # phase two: all others, on cut sequences

    Args:
        model: with a plan attached; may be a PEFT model.
        what: `pruner` trains the weights of learned pruners alone; `rest` freezes these and trains the other weights
            that were trainable before; `all` trains both, at full length unless the pruner learns on cut sequences.

    Returns:
        The weights that require a gradient, for the optimizer.

    Raises:
        ValueError: no plan attached, an unknown word, or `pruner` for a plan without learned pruners.
    """
    if what not in PARTS:
        raise ValueError(f"what must be one of {', '.join(PARTS)}, got {what!r}.")
    attached, base = attachment_of(model), base_of(model)
    pruners = {id(weight) for weight in attached.pruners.parameters()}
    if what == "pruner" and not pruners:
        raise ValueError("No pruner of this plan has weights to train; attach one such as learned_gate.")
    for weight in _frozen.pop(base, []):
        weight.requires_grad_(True)
    for weight in attached.pruners.parameters():
        weight.requires_grad_(what != "rest")
    if what == "pruner":
        _frozen[base] = [w for w in model.parameters() if w.requires_grad and id(w) not in pruners]
        for weight in _frozen[base]:
            weight.requires_grad_(False)
    attached.set_defaults(mode="learn")
    model.train()
    return [weight for weight in model.parameters() if weight.requires_grad]


class TrainerMixin:
    """Makes transformers' `Trainer` and its subclasses compute losses and metrics on the pruned sequence.

        class PrunedTrainer(tp.TrainerMixin, Trainer): ...
        class PrunedSFTTrainer(tp.TrainerMixin, SFTTrainer): ...

    The loss is the model's own, whose labels are shortened like the sequence; TRL's fused losses, which read the labels
    of the unpruned sequence, are not used. `label_smoothing_factor`, `compute_loss_func` and `compute_metrics` get the
    shortened labels, which stand at the same positions as the logits: the one at i + 1 is predicted at i. Smoothing
    applies to shifted labels, for every class of model. A plain `Trainer` without these three needs no mixin.
    """

    label_smoother: Any
    compute_loss_func: Any
    accelerator: Any
    args: Any
    _short_labels: Tensor | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch, as `Trainer.compute_loss` computes it, on labels that follow the pruned sequence."""
        from transformers import Trainer  # imports accelerate, which bare loops do not need

        smoother, own = self.label_smoother, self.compute_loss_func
        subject, trace = self.accelerator.unwrap_model(model), Trace()
        try:
            # Labels must reach the model: no pruner may read beyond the prompt, whose end they mark.
            self.label_smoother = self.compute_loss_func = None
            with ExitStack() as stack:
                if is_attached(subject):
                    trace = stack.enter_context(record(subject))
                plain: Any = Trainer.compute_loss
                loss, outputs = plain(self, model, inputs, True, num_items_in_batch)
        finally:
            self.label_smoother, self.compute_loss_func = smoother, own
        labels = inputs.get("labels") if trace.labels_BN is None else trace.labels_BN
        self._short_labels = labels
        if labels is not None and (smoother is not None or own is not None):
            if own is not None:
                found = own(outputs, labels, num_items_in_batch=num_items_in_batch)
            else:
                found = smoother(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)
            loss = found * self._scale(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Loss, logits and labels of a batch of an evaluation; the labels are as long as the logits."""
        self._short_labels = None
        parent: Any = super()
        loss, logits, labels = parent.prediction_step(*args, **kwargs)
        if torch.is_tensor(labels) and self._short_labels is not None:
            labels = self._short_labels.detach()
        return loss, logits, labels

    def _scale(self, num_items: Any) -> int:
        """Factor by which `Trainer` undoes the mean over processes, where counts are those of all processes."""
        if num_items is None or not self.args.average_tokens_across_devices:
            return 1
        return int(self.args.n_gpu if self.args.n_gpu > 1 else self.accelerator.num_processes)


@contextmanager
def schedule_step(model: nn.Module, schedule: Schedule, progress: float, draw: float = 0.5) -> Iterator[None]:
    """Run one training step at the budgets and layers of a schedule.

        for step, batch in enumerate(batches):
            with schedule_step(model, Linear(start=9), progress_at(step, num_steps)):
                model(**batch).loss.backward()

    A schedule with several passes per step (Sandwich, Matryoshka) contributes one of them, selected by `draw`.

    Args:
        model: with a plan attached.
        schedule: budget and layer over training.
        progress: completed share of training: 0 at the first step, 1 at the last.
        draw: random number in [0, 1), equal on all ranks, new at every step.

    Raises:
        ValueError: no plan attached, or progress or draw out of range.
    """
    if not 0 <= progress <= 1 or not 0 <= draw < 1:
        raise ValueError(f"progress must be in [0, 1] and draw in [0, 1), got {progress} and {draw}.")
    attached = attachment_of(model)
    passes = step_budgets(attached.plan, schedule, progress, draw)
    chosen = passes[int(draw * len(passes))]
    for pruner in attached.pruners:
        pruner.set_progress(progress)  # type: ignore[operator]
    with ExitStack() as stack:
        stack.enter_context(budgets(model, chosen))
        if schedule.moves:
            values = step_layers(attached.plan, schedule, len(attached.parts.layers), progress)
            stack.enter_context(layers(model, values))
        yield


class ScheduleCallback(TrainerCallback):
    """Applies a schedule in transformers' `Trainer` and subclasses: `Trainer(..., callbacks=[ScheduleCallback(s)])`.

    Every optimizer step, with all its accumulated batches, runs at the budgets of the schedule; evaluation and the
    trained model have the plan's own.

    Args:
        schedule: budget and layer over training.
        seed: seed of schedules that draw.
    """

    def __init__(self, schedule: Schedule, seed: int = 0) -> None:
        self.schedule, self.seed = schedule, seed
        self.stack = ExitStack()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Restore the plan's budgets if an earlier run was interrupted within a step."""
        self.stack.close()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the budgets of the step."""
        draw = draw_for(self.seed, state.global_step).random()
        progress = progress_at(state.global_step, state.max_steps)
        self.stack.close()
        self.stack.enter_context(schedule_step(kwargs["model"], self.schedule, progress, draw))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Restore the plan's budgets."""
        self.stack.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the plan's budgets and set pruners with a schedule to its end, as in an export."""
        self.stack.close()
        for pruner in attachment_of(kwargs["model"]).pruners:
            pruner.set_progress(1.0)  # type: ignore[operator]
