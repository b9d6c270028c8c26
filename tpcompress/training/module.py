"""The LightningModule: a base model, a plan in its loop, and the losses that adapt one to the other.

With a learned pruner a run has two phases. Phase one trains the pruner alone, at full length, through its gates
(mode `mask`). Phase two trains the rest on truly shorter sequences (mode `drop`). Without one there is only phase two.
Which phase a step belongs to follows from its number, so a resumed run cannot lose it.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tpcompress.families import Parts, resolve
from tpcompress.insertion.attach import attach, controller_of
from tpcompress.models import load_base, load_processor
from tpcompress.training.checkpoints.state import KEY, check_settings, check_weights, trained_state
from tpcompress.training.distributed.blank_image import with_picture
from tpcompress.training.distributed.sharding import (
    average_whole,
    calls_alike,
    check_ddp,
    clip_norm,
    shard,
    whole_weights,
)
from tpcompress.training.losses import Loss
from tpcompress.training.losses.label import Label
from tpcompress.training.nan_guard import NonFiniteLoss, check_gradients, check_loss
from tpcompress.training.optim import Optimizer, build_optimizer, group_of, warmup_cosine
from tpcompress.training.passes import Pass
from tpcompress.training.phases import (
    Phase,
    PrunerPhase,
    check_alone,
    check_full_every,
    is_learned,
    phases_of,
    steps_alone,
)
from tpcompress.training.schedules import Schedule, draw_for
from tpcompress.training.steps import check_reached, finish, student_passes
from tpcompress.training.teachers import Teacher
from tpcompress.training.trainable import add_lora, check_losses, check_packing, check_train, read_plan


class PruningModule(L.LightningModule):
    """Fine-tunes a vision-language model with a pruning plan in the loop.

    Args:
        base: folder or hub id of the model, or `tiny_llava`, which ships with tpcompress.
        plan: a pruning plan as a mapping, or the path of a plan file. null trains the dense model (the control).
        train: parts that train: any of vision_tower, projector, language_model, or full; and pruner, to train a learned
            one jointly with the rest. With LoRA, `projector` becomes one of PEFT's modules_to_save.
        lora: fields of peft.LoraConfig, or of another tuner that `peft_type` names; target_modules defaults to the
            language model's projections.
        quantize: fields of transformers' BitsAndBytesConfig, for QLoRA; needs bitsandbytes.
        losses: what is minimised; null takes the label loss alone.
        teacher: whose answers some losses imitate.
        schedule: how the budget falls to the plan's over the main phase.
        full_every: 0 gathers the retained tokens in every step; 1 trains at full length, through gates; m in one step
            of m.
        pruner_phase: how a learned pruner is trained alone, in phase one.
        optimizer: learning rates, decay and warm-up.
        reproduction: this recipe repeats a published one, defects and all: no warning of what is known not to learn.
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
        # Checkpoints hold what trains; everything else is the base's, which is loaded anyway.
        self.strict_loading = False
        self.processor = load_processor(base)
        self.model: nn.Module | None = None
        self.parts: Parts | None = None
        self.trainable: list[nn.Parameter] = []
        self.in_step = False  # weights, scheduler and step count do not belong together at the moment
        self._phases: list[Phase] | None = None
        self._resumed: dict[str, Any] = {}  # what the checkpoint says of its run

    # ------------------------------------------------------------------ set-up

    def setup(self, stage: str) -> None:
        """Refuse packed data that the plan or the attention cannot take, before anything large is loaded."""
        if getattr(self.trainer.datamodule, "pack", False):  # type: ignore[attr-defined]
            check_packing(self.plan, self.attention)

    def configure_model(self) -> None:
        """Load the base, then LoRA, then the plan; called by Lightning on every rank, and idempotent."""
        if self.model is None:
            with whole_weights(self._trainer):
                self._make_model()

    def _make_model(self) -> None:
        model: Any = load_base(self.base, self.dtype_name, self.attention, self.quantize)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.parts = resolve(model)
        if self.teacher is not None:
            self.teacher.prepare(self, model)
        if self.gradient_checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if self.lora is not None:
            model = add_lora(model, self.lora, self.parts, self.train_parts)
        if self.plan is not None:
            attach(model, self.plan)
        trained = self.train_parts | ({"pruner"} if is_learned(self.plan) else set())
        for name, parameter in model.named_parameters():
            if group_of(name, self.parts) in trained and (self.lora is None or "pruner" in name):
                parameter.requires_grad_(True)
        # Loaded in eval mode, and Lightning leaves modes alone: no dropout, no gate, no checkpointing otherwise.
        self.model = model.train()
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if self._trainer is not None and "mixed" in str(self._trainer.precision):
            for parameter in self.trainable:  # a half-precision weight rounds small updates away
                parameter.data = parameter.data.float()
        for loss in [*self.losses, *(self.pruner_phase.losses or [])]:
            loss.prepare(self)
        if self.device_mesh is not None:
            shard(model, self.parts, self.device_mesh["data_parallel"])
            self.trainable = [p for p in model.parameters() if p.requires_grad]  # sharding makes new ones

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
    def phase(self) -> Phase:
        """The phase of the step at hand."""
        return next((phase for phase in self.phases if self.global_step < phase.end), self.phases[-1])

    def configure_optimizers(self) -> Any:
        """AdamW with groups and the warm-up-cosine of each phase."""
        assert self.model is not None
        assert self.parts is not None
        optimizer = build_optimizer(self.model, self.parts, self.optimizer_settings)
        check_alone(self.phases, self._resumed)
        check_ddp(self.trainer, self.phases)
        scheduler = warmup_cosine(optimizer, self.optimizer_settings, self.phases)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def pruner_parameters(self) -> list[nn.Parameter]:
        """The weights of the plan's pruners."""
        assert self.model is not None
        return [] if self.plan is None else list(controller_of(self.model).pruners.parameters())

    # ------------------------------------------------------------------ a step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step and choose what trains in it."""
        # One seed per step instead of saved generator states: a resumed run draws what the uninterrupted one drew.
        torch.manual_seed(draw_for(self.seed, self.global_step, batch_idx, self.global_rank).getrandbits(62))
        phase, pruners = self.phase, {id(p) for p in self.pruner_parameters()}
        for parameter in self.trainable:
            parameter.requires_grad_(phase.pruner if id(parameter) in pruners else phase.rest)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The losses of one batch, pruned as the step's phase, mode and budgets say; a mean over passes."""
        phase = self.phase
        batch, added = self._with_picture(batch)
        # Shared by the ranks: the budget decides how long the sequences are.
        draw = draw_for(self.seed, self.global_step, batch_idx).random()
        terms: dict[str, Tensor] = {}
        passes = student_passes(self, phase, batch, draw, blind=added)
        for _, losses in passes:
            for name, value in losses.items():
                share = value.float() / len(passes)
                terms[name] = terms[name] + share if name in terms else share
        loss = torch.stack(list(terms.values())).sum() if terms else torch.zeros((), device=self.device)
        check_loss(self.trainer, loss, terms)
        self._log_step(terms, loss, passes[-1][0], phase, len(batch["input_ids"]))
        if not loss.requires_grad:  # a batch without images, and only what sees images trains
            check_reached(self, phase, passes)
            loss = loss + sum((p.sum() * 0.0).float() for p in self.trainable if p.requires_grad)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Label loss with the plan's own budget and truly shorter sequences, as after export."""
        assert self.model is not None
        size = len(batch["input_ids"])
        batch = {k: v for k, v in self._with_picture(batch)[0].items() if k != "meta"}
        finish(self.model)
        loss = self.model(**batch, use_cache=False).loss
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=size)

    def _with_picture(self, batch: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Where every process must call the same modules, one that has no picture gets one."""
        collator = getattr(self.trainer.datamodule, "collator", None)  # type: ignore[attr-defined]
        if collator is None or not calls_alike(self.trainer):
            return batch, False
        return with_picture(batch, collator)

    def _log_step(self, terms: dict[str, Tensor], loss: Tensor, here: Pass, phase: Phase, size: int) -> None:
        self.log_dict({f"loss/{name}": value.detach() for name, value in terms.items()}, batch_size=size)
        self.log("loss/total", loss.detach(), prog_bar=True, batch_size=size)
        if here.trace is not None and here.trace.stages and not phase.full(self.global_step):
            last = here.trace.stages[-1]
            self.log("vision_tokens", sum(last.vision_out) / len(last.total), batch_size=size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stop before a step that would spread a NaN. From here until the scheduler has followed, nothing is saved."""
        if self.device_mesh is not None:
            average_whole(self.trainable)
        check_gradients(self.trainer, self.trainable)
        self.in_step = True

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning's, which cannot clip weights of which some are cut over the processes and some are not."""
        if self.device_mesh is None or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_norm(self.trainable, gradient_clip_val)

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
        checkpoint[KEY]["alone"] = steps_alone(self.phases)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another recipe: Lightning would load what fits and train on."""
        if "state_dict" in checkpoint:  # DeepSpeed loads the weights itself
            check_weights(self, self.trainable, checkpoint["state_dict"])
        if self.trainer.state.fn == "fit":
            check_settings(self.settings, checkpoint[KEY]["settings"])
            self._resumed = checkpoint[KEY]


__all__ = ["NonFiniteLoss", "PruningModule", "load_base", "load_processor"]
