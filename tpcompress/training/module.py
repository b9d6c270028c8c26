"""The LightningModule: a base model, a plan in its loop, and the losses that adapt one to the other.

With a learned pruner a run has two phases. Phase one trains the scorer alone, at full length, through its gate
(mode `mask`). Phase two freezes the scorer and trains the backbone on truly shorter sequences (mode `drop`). Without
one there is only phase two. Which phase a step belongs to follows from its number, so a resumed run cannot lose it.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tpcompress.families import Parts, resolve
from tpcompress.insertion.attach import attach, budgets, controller_of, mode, record
from tpcompress.insertion.plan import Budget
from tpcompress.insertion.trace import Trace
from tpcompress.training.base import load_base, load_processor
from tpcompress.training.finite import NonFiniteLoss, check_gradients, check_loss
from tpcompress.training.objectives import gate_losses, kl_to_teacher
from tpcompress.training.optim import Optimizer, build_optimizer, group_of, warmup_cosine
from tpcompress.training.parts import Distill, Scorer, add_lora, check_packing, check_train, read_plan
from tpcompress.training.schedules import Constant, Schedule, draw_for, progress_at
from tpcompress.training.state import KEY, check_settings, check_weights, trained_state


class PruningModule(L.LightningModule):
    """Fine-tunes a vision-language model with a pruning plan in the loop.

    Args:
        base: folder or hub id of the model, or `tiny_llava`, which ships with tpcompress.
        plan: a pruning plan as a mapping, or the path of a plan file. null trains the dense model (the control).
        train: parts that train: any of vision_tower, projector, language_model, or full. With LoRA, `projector`
            becomes one of PEFT's modules_to_save.
        lora: fields of peft.LoraConfig; target_modules defaults to the language model's projections.
        distill: KL to the unpruned teacher beside the label loss.
        schedule: how the budget falls to the plan's over phase two.
        scorer: how a learned pruner is trained in phase one.
        optimizer: learning rates, decay and warm-up.
        dtype: in which the weights are loaded: float32, bfloat16, float16 or auto.
        attention: attention implementation of transformers; null takes its default.
        gradient_checkpointing: recompute decoder layers in the backward pass.
        seed: of everything drawn in a step: budgets, noise, dropout.

    Raises:
        ValueError: a plan, part, LoRA field or schedule that cannot be.
    """

    def __init__(
        self,
        base: str = "tiny_llava",
        plan: dict[str, Any] | str | None = None,
        train: list[str] | str = "full",
        lora: dict[str, Any] | None = None,
        distill: Distill | None = None,
        schedule: Schedule | None = None,
        scorer: Scorer | None = None,
        optimizer: Optimizer | None = None,
        dtype: str = "float32",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.plan = read_plan(plan)
        self.base, self.lora, self.distill, self.seed = base, lora, distill, seed
        self.train_parts = check_train(train, lora, self.plan)
        if distill and distill.teacher == "adapter_off" and lora is None:
            raise ValueError("distill.teacher adapter_off needs lora; set it, or take teacher copy.")
        self.schedule = schedule or Constant()
        self.scorer = scorer or Scorer()
        self.optimizer_settings = optimizer or Optimizer()
        self.dtype_name, self.attention, self.gradient_checkpointing = dtype, attention, gradient_checkpointing
        self.settings = {
            "base": base,
            "plan": self.plan.to_dict() if self.plan else None,
            "train": sorted(self.train_parts),
            "lora": lora,
            "dtype": dtype,
            "attention": attention,
        }
        # Checkpoints hold what trains; everything else is the base's, which is loaded anyway.
        self.strict_loading = False
        self.processor = load_processor(base)
        self.model: nn.Module | None = None
        self.teacher: list[nn.Module] = []  # a list, so that Lightning neither moves, saves nor trains it
        self.parts: Parts | None = None
        self.trainable: list[nn.Parameter] = []
        self.in_step = False  # weights, scheduler and step count do not belong together at the moment

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Refuse packed data that the plan or the attention cannot take, before anything large is loaded."""
        if getattr(self.trainer.datamodule, "pack", False):  # type: ignore[attr-defined]
            check_packing(self.plan, self.attention)

    def configure_model(self) -> None:
        """Load the base, then LoRA, then the plan; called by Lightning on every rank, and idempotent."""
        if self.model is not None:
            return
        model: Any = load_base(self.base, self.dtype_name, self.attention)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.parts = resolve(model)
        if self.distill and self._teacher_is_copy:
            self.teacher = [copy.deepcopy(model).eval()]
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is not None:
            model = add_lora(model, self.lora, self.parts, self.train_parts)
        if self.plan is not None:
            attach(model, self.plan)
        for name, parameter in model.named_parameters():
            if group_of(name, self.parts) in self._trained_groups and (self.lora is None or "pruner" in name):
                parameter.requires_grad_(True)
        # Loaded in eval mode, and Lightning leaves modes alone: no dropout, no gate, no checkpointing otherwise.
        self.model = model.train()
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if self._trainer is not None and "mixed" in str(self._trainer.precision):
            for parameter in self.trainable:  # a half-precision weight rounds small updates away
                parameter.data = parameter.data.float()

    @property
    def _trained_groups(self) -> set[str]:
        learned = self.plan is not None and any(stage.rule.learned for stage in self.plan.stages)
        return self.train_parts | ({"pruner"} if learned else set())

    @property
    def _teacher_is_copy(self) -> bool:
        assert self.distill is not None
        return self.distill.teacher == "copy" or (self.distill.teacher == "auto" and self.lora is None)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    @property
    def scorer_steps(self) -> int:
        """Optimizer steps of phase one."""
        return self.scorer.count(self.plan, self.total_steps)

    def configure_optimizers(self) -> Any:
        """AdamW with groups and the warm-up-cosine of each phase."""
        assert self.model is not None
        assert self.parts is not None
        optimizer = build_optimizer(self.model, self.parts, self.optimizer_settings)
        scheduler = warmup_cosine(optimizer, self.optimizer_settings, self.scorer_steps, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ------------------------------------------------------------------ a step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step and choose what trains in it."""
        # One seed per step instead of saved generator states: a resumed run draws what the uninterrupted one drew.
        torch.manual_seed(draw_for(self.seed, self.global_step, batch_idx, self.global_rank).getrandbits(62))
        assert self.model is not None
        in_scorer = {id(p) for p in self._scorer_parameters()}
        for parameter in self.trainable:
            parameter.requires_grad_((id(parameter) in in_scorer) == self._training_scorer)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The losses of one batch, pruned as the step's phase, mode and budget say."""
        assert self.model is not None
        batch = {k: v for k, v in batch.items() if k != "meta"}
        values = self._budgets(batch_idx)
        with ExitStack() as stack:
            trace = self._enter_pruning(stack, values)
            output = self.model(**batch, use_cache=False)
        losses = {"label": output.loss}
        if self.distill and not self._training_scorer:
            labels = batch["labels"] if trace is None or trace.labels_BN is None else trace.labels_BN
            losses["distill"] = self.distill.weight * kl_to_teacher(
                output.logits, labels, self._teacher_logits(batch), batch["labels"], self.distill.temperature
            )
        if self._training_scorer and trace is not None:
            warm = self.global_step < self.scorer.warm_up_steps
            losses |= gate_losses(
                trace,
                values,
                self.scorer.budget_weight,
                self.scorer.guide() if warm else None,
                self.scorer.warm_up_weight,
            )
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        check_loss(self.trainer, loss, losses)
        self._log_step(losses, loss, trace, len(batch["input_ids"]))
        if not loss.requires_grad:  # a batch without images, and only what sees images trains
            loss = loss + sum((p.sum() * 0.0).float() for p in self.trainable if p.requires_grad)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Label loss with the plan's own budget and truly shorter sequences, as after export."""
        assert self.model is not None
        batch = {k: v for k, v in batch.items() if k != "meta"}
        loss = self.model(**batch, use_cache=False).loss
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))

    @property
    def _training_scorer(self) -> bool:
        return self.global_step < self.scorer_steps

    def _scorer_parameters(self) -> list[nn.Parameter]:
        assert self.model is not None
        if self.plan is None:
            return []
        return list(controller_of(self.model).pruners.parameters())

    def _progress(self) -> float:
        """Share of the phase that is done: 0 at its first step, 1 at its last."""
        if self._training_scorer:
            return progress_at(self.global_step, self.scorer_steps)
        return progress_at(self.global_step - self.scorer_steps, self.total_steps - self.scorer_steps)

    def _budgets(self, batch_idx: int) -> list[Budget]:
        """The budget of each stage at this step."""
        if self.plan is None:
            return []
        schedule = (self.scorer.schedule or Constant()) if self._training_scorer else self.schedule
        # Shared by the ranks: the budget decides how long the sequences are.
        draw = draw_for(self.seed, self.global_step, batch_idx).random()
        return [schedule.budget(stage.budget, self._progress(), draw) for stage in self.plan.stages]

    def _enter_pruning(self, stack: ExitStack, values: list[Budget]) -> Trace | None:
        """Mode, budgets and record of this step."""
        if self.plan is None:
            return None
        assert self.model is not None
        for pruner in controller_of(self.model).pruners:
            # A learned one has learnt when the rest trains; a scheduled one goes along with what trains.
            done = pruner.learned and not self._training_scorer
            pruner.set_progress(1.0 if done else self._progress())  # type: ignore[operator]
        stack.enter_context(mode(self.model, "mask" if self._training_scorer else "drop"))
        stack.enter_context(budgets(self.model, values))
        return stack.enter_context(record(self.model))

    def _log_step(self, losses: dict[str, Tensor], loss: Tensor, trace: Trace | None, size: int) -> None:
        self.log_dict({f"loss/{name}": value.detach() for name, value in losses.items()}, batch_size=size)
        self.log("loss/total", loss.detach(), prog_bar=True, batch_size=size)
        if trace is not None and trace.stages and not self._training_scorer:
            last = trace.stages[-1]
            self.log("vision_tokens", sum(last.vision_out) / len(last.total), batch_size=size)

    @torch.no_grad()
    def _teacher_logits(self, batch: dict[str, Any]) -> Tensor:
        """The unpruned teacher: a frozen copy, or this model with its adapters and its plan off."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        if self.teacher:
            self.teacher[0].to(self.device)
            return self.teacher[0](**inputs, use_cache=False).logits
        model: Any = self.model
        was_training = model.training
        model.eval()
        with ExitStack() as stack:
            stack.enter_context(model.disable_adapter())
            if self.plan is not None:
                stack.enter_context(mode(model, "off"))
            logits = model(**inputs, use_cache=False).logits
        model.train(was_training)
        return logits

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a step that would spread a NaN. From here until the scheduler has followed, nothing is saved."""
        check_gradients(self.trainer, self.trainable)
        self.in_step = True

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """As Lightning's; the step is complete."""
        super().lr_scheduler_step(scheduler, metric)
        self.in_step = False

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, and say whether the run is finished."""
        for parameter in self.trainable:  # DeepSpeed saves what requires a gradient, in whichever phase
            parameter.requires_grad_(True)
        checkpoint["state_dict"] = trained_state(self, self.trainable, checkpoint["state_dict"])
        checkpoint[KEY] = {"step": self.global_step, "steps": self.total_steps, "settings": self.settings}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another recipe: Lightning would load what fits and train on."""
        if "state_dict" in checkpoint:  # DeepSpeed loads the weights itself
            check_weights(self, self.trainable, checkpoint["state_dict"])
        if self.trainer.state.fn == "fit":
            check_settings(self.settings, checkpoint[KEY]["settings"])


__all__ = ["NonFiniteLoss", "PruningModule", "load_base", "load_processor"]
