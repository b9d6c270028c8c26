"""The LightningModule: fine-tunes a base model with a pruning plan in the loop.

With a learned pruner a run has two phases. Phase one trains the pruner alone, at full length, through its gates
(mode `mask`). Phase two trains the rest on the pruned sequences (mode `drop`). Without a learned pruner there is only
phase two. The phase is derived from the step number, so it needs no state in a checkpoint.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tpcompress.families import Parts, resolve
from tpcompress.insertion.attach import attach, attachment_of
from tpcompress.models import load_base, load_config, load_processor, max_positions
from tpcompress.training.adapters import adapter_tensors, add_lora
from tpcompress.training.checkpoint_content import KEY, check_settings, check_weights, complete, with_base_weights
from tpcompress.training.context import StepContext
from tpcompress.training.distributed.blank_image import with_blank_image_if_needed
from tpcompress.training.distributed.ddp import check_ddp
from tpcompress.training.distributed.fsdp2 import shard
from tpcompress.training.distributed.gradients import average_unsharded, clip_norm
from tpcompress.training.distributed.zero import unsharded_weights
from tpcompress.training.losses import Loss
from tpcompress.training.losses.label import Label
from tpcompress.training.nan_guard import check_gradients, check_loss
from tpcompress.training.optim import Optimizer, build_optimizer, warmup_cosine
from tpcompress.training.passes import Pass, count_answers
from tpcompress.training.phases import Phase, PrunerPhase, check_alone, check_full_every, is_learned, phases_of
from tpcompress.training.probe_of_run import ProbeOfRun
from tpcompress.training.schedules import Schedule, draw_for
from tpcompress.training.step_mean import StepMean, check_average
from tpcompress.training.steps import check_gradient_reaches_pruner, mean_terms, set_progress_done, student_passes
from tpcompress.training.teachers import Teacher
from tpcompress.training.trainable import check_losses, check_packing, check_train, mark_trainable, read_plan


class PruningModule(L.LightningModule):
    """Fine-tunes a vision-language model with a pruning plan in the loop.

    Args:
        base: folder or hub id of the model, or `tiny_llava`, which ships with tpcompress.
        plan: pruning plan as a mapping, or the path of a plan file; null trains the dense model (the control).
        train: parts that train: vision_tower, projector, language_model, or full; and pruner, to train a learned pruner
            jointly with the rest. With LoRA, `projector` becomes one of PEFT's modules_to_save.
        lora: fields of peft.LoraConfig, or of another tuner named by `peft_type`; target_modules defaults to the
            projections of the language model.
        quantize: fields of transformers' BitsAndBytesConfig, for QLoRA; requires bitsandbytes.
        losses: terms of the objective; null for the label loss alone.
        teacher: teacher of the distillation losses.
        schedule: budget schedule of the main phase; null for the plan's budgets.
        full_every: 0 trains on the pruned sequence in every step, 1 at full length through gates, m at full length in
            one step of m.
        pruner_phase: settings of phase one, in which a learned pruner trains alone.
        optimizer: learning rates, weight decay and warm-up.
        reproduction: the recipe reproduces a published one, including its defects; suppresses the warning about
            estimators that are known not to learn.
        dtype: dtype in which weights are loaded: float32, bfloat16, float16 or auto.
        attention: attention implementation of transformers; null for its default.
        gradient_checkpointing: recompute decoder layers in the backward pass.
        average_over: `tokens` makes the loss of an optimizer step a mean over its answer tokens, across accumulated
            batches and ranks; `samples` averages the tokens of each sample first, so that long answers count no more.
        seed: seed of everything that is drawn in a step: budgets, noise, dropout.

    Raises:
        ValueError: an invalid plan, part, LoRA field, loss or schedule.
    """

    def __init__(
        self,
        base: str = "tiny_llava",
        plan: dict[str, Any] | str | None = None,
        train: list[str] | str = "full",
        lora: dict[str, Any] | None = None,
        quantize: dict[str, Any] | None = None,
        losses: list[Loss] | None = None,
        teacher: Teacher | None = None,
        schedule: Schedule | None = None,
        full_every: int = 0,
        pruner_phase: PrunerPhase | None = None,
        optimizer: Optimizer | None = None,
        reproduction: bool = False,
        dtype: str = "float32",
        attention: str | None = None,
        gradient_checkpointing: bool = False,
        average_over: str = "tokens",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.plan = read_plan(plan)
        self.base, self.lora, self.quantize, self.seed = base, lora, quantize, seed
        self.train_parts = check_train(train, lora, self.plan)
        self.losses: list[Loss] = [Label()] if losses is None else losses
        self.teacher = teacher
        self.schedule, self.full_every = schedule, check_full_every(full_every)
        self.pruner_phase = pruner_phase or PrunerPhase()
        self.reproduction = reproduction
        self.optimizer_settings = optimizer or Optimizer()
        self.dtype_name, self.attention, self.gradient_checkpointing = dtype, attention, gradient_checkpointing
        check_losses([*self.losses, *(self.pruner_phase.losses or [])], teacher, self.plan)
        self.settings = {
            "base": base,
            "plan": self.plan.to_dict() if self.plan else None,
            "train": sorted(self.train_parts),
            "lora": lora,
            "quantize": quantize,
            "dtype": dtype,
            "attention": attention,
        }
        self.strict_loading = False  # checkpoints contain the trained weights only
        self.processor, self.max_positions = load_processor(base), max_positions(base)
        self.probe = ProbeOfRun()
        self.recipe: dict[str, Any] | None = None  # the complete recipe, if the run has one
        self.model: nn.Module | None = None
        self.parts: Parts | None = None
        self.trainable: list[nn.Parameter] = []
        self.added: set[str] = set()  # names of the adapters' tensors in the model
        self.average_over = check_average(average_over)
        self.step_mean = StepMean(average_over)
        self.in_step = False  # between optimizer and scheduler step, where a checkpoint would be inconsistent
        self._phases: list[Phase] | None = None
        self._resumed: dict[str, Any] = {}  # the checkpoint's entry about its run

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Refuse packed data that the plan or the attention does not support, before the base is loaded."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        several_rows = getattr(data, "pack_sequences", False)
        if several_rows or getattr(data, "pack", False):
            check_packing(self.plan, self.attention, load_config(self.base), several_rows)

    def configure_model(self) -> None:
        """Load the base, then LoRA, then the plan; called by Lightning on every rank, and idempotent."""
        if self.model is None:
            with unsharded_weights(self._trainer):
                self._make_model()

    def _make_model(self) -> None:
        model: Any = load_base(self.base, self.dtype_name, self.attention, self.quantize)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.parts = resolve(model)
        if self.teacher is not None:
            self.teacher.prepare(model, self.parts, self.plan, self.lora)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is not None:
            needs_base = self.teacher is not None and self.teacher.is_the_model_without_adapters
            own = [*model.parameters(), *model.buffers()]
            model = add_lora(model, self.lora, self.parts, self.train_parts, needs_base)
            self.added = adapter_tensors(model, own)
        if self.plan is not None:
            attach(model, self.plan)
        trained = self.train_parts | ({"pruner"} if is_learned(self.plan) else set())
        mixed = self._trainer is not None and "mixed" in str(self._trainer.precision)
        self.model, self.trainable = model, mark_trainable(model, self.parts, trained, self.lora is not None, mixed)
        for loss in [*self.losses, *(self.pruner_phase.losses or [])]:
            loss.prepare(model, self.parts, self.plan)
        if self.device_mesh is not None:
            shard(model, self.parts, self.device_mesh["data_parallel"])
            self.trainable = [p for p in model.parameters() if p.requires_grad]  # sharding creates new parameters

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.trainer.estimated_stepping_batches)

    @property
    def phases(self) -> list[Phase]:
        """The phases of the run."""
        if self._phases is None:
            rest = len(self.trainable) > len(self.pruner_parameters())
            main = (self.full_every, self.schedule, self.losses)
            self._phases = phases_of(self.plan, self.total_steps, self.train_parts, rest, self.pruner_phase, main)
        return self._phases

    @property
    def context(self) -> StepContext:
        """What losses, teachers and diagnostics may read at the current step."""
        assert self.model is not None and self.parts is not None
        per_sample = self.average_over == "samples"
        return StepContext(self.model, self.parts, self.plan, self.global_step, self.device, per_sample)

    @property
    def phase(self) -> Phase:
        """The phase of the current step."""
        return next((phase for phase in self.phases if self.global_step < phase.end), self.phases[-1])

    def configure_optimizers(self) -> Any:
        """AdamW with parameter groups, and a warm-up-cosine learning rate per phase."""
        assert self.model is not None and self.parts is not None
        optimizer = build_optimizer(self.model, self.parts, self.optimizer_settings)
        check_alone(self.phases, self._resumed)
        check_ddp(self.trainer, self.phases)
        scheduler = warmup_cosine(optimizer, self.optimizer_settings, self.phases)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def pruner_parameters(self) -> list[nn.Parameter]:
        """The weights of the plan's pruners."""
        assert self.model is not None
        return [] if self.plan is None else list(attachment_of(self.model).pruners.parameters())

    # ------------------------------------------------------------------ a step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step and set which weights train in it."""
        # A seed per step instead of saved generator states: a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(draw_for(self.seed, self.global_step, batch_idx, self.global_rank).getrandbits(62))
        phase, pruners = self.phase, {id(p) for p in self.pruner_parameters()}
        for parameter in self.trainable:
            parameter.requires_grad_(phase.pruner if id(parameter) in pruners else phase.rest)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The losses of one batch with the phase, mode and budgets of the step; mean over its passes.

        The logged loss is that of the batch; the returned one is weighted by its share of the optimizer step.
        """
        phase = self.phase
        batch, blank_image = with_blank_image_if_needed(self.trainer, batch)
        # Equal on all ranks, because budgets set the sequence lengths.
        draw = draw_for(self.seed, self.global_step, batch_idx).random()
        ctx = self.context
        passes = student_passes(ctx, phase, self.teacher, batch, draw, blank_image)
        terms = mean_terms(passes)
        loss = torch.stack(list(terms.values())).sum() if terms else torch.zeros((), device=self.device)
        check_loss(self.trainer, loss, terms)
        self._log_step(terms, loss, passes[-1][0], phase, len(batch["input_ids"]))
        if not loss.requires_grad:  # a batch without images, where only the vision side trains
            check_gradient_reaches_pruner(ctx, phase, passes)
            loss = loss + sum((p.sum() * 0.0).float() for p in self.trainable if p.requires_grad)
        return self.step_mean.weighed(self.trainer, loss, passes[0][0])

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Label loss with the plan's own budget on the pruned sequences, as after export."""
        assert self.model is not None
        size = count_answers(batch) or len(batch["input_ids"])  # of the mean over batches and ranks
        batch = {k: v for k, v in with_blank_image_if_needed(self.trainer, batch)[0].items() if k != "meta"}
        set_progress_done(self.model)
        loss = self.model(**batch, use_cache=False).loss
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=size)

    def _log_step(self, terms: dict[str, Tensor], loss: Tensor, student: Pass, phase: Phase, size: int) -> None:
        self.log_dict({f"loss/{name}": value.detach() for name, value in terms.items()}, batch_size=size)
        self.log("loss/total", loss.detach(), prog_bar=True, batch_size=size)
        if student.trace is not None and student.trace.stages and not phase.full(self.global_step):
            last = student.trace.stages[-1]
            self.log("vision_tokens", last.per_image, batch_size=size)
            self.log("vision_tokens_per_sequence", last.per_sequence, batch_size=size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before the step if a gradient is not finite. Until the scheduler step, no checkpoint is written."""
        if self.device_mesh is not None:
            average_unsharded(self.trainable)
        self.step_mean.rescale(self.trainer, self.trainable)
        check_gradients(self.trainer, self.trainable)
        self.in_step = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Run the optimizer step, for which gradients are divided by the answer tokens of all its batches."""
        super().optimizer_step(*args, **kwargs)
        self.step_mean.restore()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm over sharded and unsharded weights together, which Lightning does not support."""
        if self.device_mesh is None or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_norm(self.trainable, gradient_clip_val)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Run the scheduler step; afterwards the optimizer step is complete."""
        super().lr_scheduler_step(scheduler, metric)
        self.in_step = False

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Reduce the checkpoint to the trained weights, and add steps, recipe and a probe of the model."""
        for parameter in self.trainable:  # DeepSpeed saves weights that require a gradient, in every phase
            parameter.requires_grad_(True)
        complete(checkpoint, self, self.probe)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another recipe, of which Lightning would load the matching part."""
        if "state_dict" in checkpoint:  # DeepSpeed loads the weights itself
            check_weights(self, self.trainable, checkpoint["state_dict"])
            with_base_weights(self, checkpoint)
        if self.trainer.state.fn == "fit":
            check_settings(self.settings, checkpoint[KEY]["settings"])
            self._resumed = checkpoint[KEY]
