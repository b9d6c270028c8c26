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
from transformers import AutoModelForImageTextToText, AutoProcessor

from tpcompress.bundled import base_path
from tpcompress.families import Parts, resolve
from tpcompress.insertion.attach import attach, base_of, budgets, controller_of, mode, record
from tpcompress.insertion.trace import Trace
from tpcompress.training.objectives import budget_loss, kl_to_teacher, warm_up_loss
from tpcompress.training.optim import Optimizer, build_optimizer, group_of, warmup_cosine
from tpcompress.training.parts import Distill, Scorer, add_lora, check_train, read_plan
from tpcompress.training.schedules import Constant, Schedule, draw_for


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; training stops before the step that would spread it."""


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
        self.schedule = schedule or Constant()
        self.scorer = scorer or Scorer()
        self.optimizer_settings = optimizer or Optimizer()
        self.dtype_name, self.attention, self.gradient_checkpointing = dtype, attention, gradient_checkpointing
        plan_dict = self.plan.to_dict() if self.plan else None
        self.save_hyperparameters(
            {"base": base, "plan": plan_dict, "train": sorted(self.train_parts), "lora": lora, "dtype": dtype}
        )
        # Checkpoints hold what trains; everything else is the base's, which is loaded anyway.
        self.strict_loading = False
        self.processor = load_processor(base)
        self.model: nn.Module | None = None
        self.teacher: list[nn.Module] = []  # a list, so that Lightning neither moves, saves nor trains it
        self.parts: Parts | None = None
        self.trainable: list[nn.Parameter] = []

    # ------------------------------------------------------------------ set-up

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
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is not None:
            model = add_lora(model, self.lora, self.parts, self.train_parts)
        if self.plan is not None:
            attach(model, self.plan)
        for name, parameter in model.named_parameters():
            if group_of(name, self.parts) in self._trained_groups and (self.lora is None or "pruner" in name):
                parameter.requires_grad_(True)
        self.model = model
        self.trainable = [p for p in model.parameters() if p.requires_grad]

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
        torch.manual_seed(draw_for(self.seed, self.current_epoch, batch_idx, self.global_rank).getrandbits(62))
        assert self.model is not None
        in_scorer = {id(p) for p in self._scorer_parameters()}
        for parameter in self.trainable:
            parameter.requires_grad_((id(parameter) in in_scorer) == self._training_scorer)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The losses of one batch, pruned as the step's phase, mode and budget say."""
        assert self.model is not None
        batch = {k: v for k, v in batch.items() if k != "meta"}
        start, end = (0, self.scorer_steps) if self._training_scorer else (self.scorer_steps, self.total_steps)
        progress = (self.global_step - start) / max(1, end - start)
        # Shared by the ranks: the budget decides how long the sequences are.
        draw = draw_for(self.seed, self.current_epoch, batch_idx).random()
        with ExitStack() as stack:
            trace = self._enter_pruning(stack, progress, draw)
            output = self.model(**batch, use_cache=False)
        losses = {"label": output.loss}
        if self.distill and not self._training_scorer:
            labels = batch["labels"] if trace is None or trace.labels_BN is None else trace.labels_BN
            losses["distill"] = self.distill.weight * kl_to_teacher(
                output.logits, labels, self._teacher_logits(batch), batch["labels"], self.distill.temperature
            )
        if self._training_scorer and trace is not None:
            losses |= self._gate_losses(trace)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        self._stop_if_not_finite(loss, losses)
        size = len(batch["input_ids"])
        self.log_dict({f"loss/{name}": value.detach() for name, value in losses.items()}, batch_size=size)
        self.log("loss/total", loss.detach(), prog_bar=True, batch_size=size)
        if trace is not None and trace.stages:
            last = trace.stages[-1]
            self.log("vision_tokens", sum(last.vision_out) / len(last.total), batch_size=size)
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

    def _enter_pruning(self, stack: ExitStack, progress: float, draw: float) -> Trace | None:
        """Mode, budget and record of this step."""
        if self.plan is None:
            return None
        assert self.model is not None
        for pruner in controller_of(self.model).pruners:
            pruner.set_progress(progress if self._training_scorer else 1.0)  # type: ignore[operator]
        schedule = self.scorer.schedule or Constant() if self._training_scorer else self.schedule
        values = [schedule.budget(stage.budget, progress, draw) for stage in self.plan.stages]
        stack.enter_context(mode(self.model, "mask" if self._training_scorer else "drop"))
        stack.enter_context(budgets(self.model, values))
        return stack.enter_context(record(self.model))

    def _gate_losses(self, trace: Trace) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for stage in trace.stages:
            if stage.selection is None or stage.selection.gate_BV is None or stage.view is None:
                continue
            valid_RV = stage.view.valid_BV
            kept_R = torch.tensor(stage.vision_out, device=valid_RV.device)
            if self.scorer.budget_weight:
                term = self.scorer.budget_weight * budget_loss(stage.selection.gate_BV, valid_RV, kept_R)
                losses["budget"] = losses.get("budget", 0.0) + term
            if self.global_step < self.scorer.warm_up_steps:
                guide = self.scorer.guide()(stage.view, torch.tensor(stage.vision_out))
                term = self.scorer.warm_up_weight * warm_up_loss(stage.selection.scores_BV, guide.keep_BV, valid_RV)
                losses["warm_up"] = losses.get("warm_up", 0.0) + term
        return losses

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

    def _stop_if_not_finite(self, loss: Tensor, losses: dict[str, Tensor]) -> None:
        finite = bool(torch.isfinite(loss))
        if self.trainer.world_size > 1:
            finite = self.trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            values = ", ".join(f"{name} {float(value):g}" for name, value in losses.items())
            raise NonFiniteLoss(
                f"The loss is not finite at step {self.global_step} ({values}); the last checkpoint is untouched. "
                f"Resume from it with a lower learning rate, or train in bf16 or fp32 instead of fp16."
            )

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, and say whether the run is finished."""
        keep = {name for name, parameter in self.named_parameters() if any(parameter is t for t in self.trainable)}
        buffers = {name for name, _ in self.named_buffers() if "token_pruners." in name}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keep | buffers}
        checkpoint["tpcompress"] = {"step": self.global_step, "steps": self.total_steps}


def load_base(base: str, dtype: str = "float32", attention: str | None = None) -> nn.Module:
    """A vision-language model from a folder, the hub, or the package.

    Raises:
        ValueError: unknown dtype, or nothing loadable there.
    """
    if dtype not in ("float32", "bfloat16", "float16", "auto"):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or auto, got {dtype!r}.")
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        return AutoModelForImageTextToText.from_pretrained(base_path(base), dtype=dtype, **options)
    except OSError as error:
        raise ValueError(
            f"No model at '{base}': {first_line(error)} Give a folder, a hub id, or tiny_llava."
        ) from error


def load_processor(base: str) -> Any:
    """The processor of a base model.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoProcessor.from_pretrained(base_path(base))
    except OSError as error:
        raise ValueError(f"No processor at '{base}': {first_line(error)} Give a folder or hub id.") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().splitlines()[0]


__all__ = ["NonFiniteLoss", "PruningModule", "base_of", "load_base", "load_processor"]
