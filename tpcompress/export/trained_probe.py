"""What a trained model answers in its own process, kept in its checkpoints: a wrong reload or merge is noticed.

The probe of an exported folder is recorded from the model that was loaded again for the export. This one is recorded
before, from the model that trained, so that the way from the training process to the exported folder is checked too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpcompress.errors import first_line
from tpcompress.export.probe import LOGIT_TOLERANCE, environment
from tpcompress.inference import inference, inputs_for
from tpcompress.insertion.attach import base_of, budgets, is_attached, mode, plan_of, record

ROUGH = 0.25
"""Largest logit gap, as a share of the largest logit, in half precision or on another device or version."""


@dataclass(frozen=True)
class TrainedProbe:
    """A model's answer to one input.

    Attributes:
        inputs: arguments of the call, on the CPU.
        retained: number of tokens retained by each stage, for each image; empty without a plan.
        logits: fp32 logits after the last input token (samples, vocabulary).
        about: environment of the recording, and the precision of the trainer.
    """

    inputs: dict[str, Tensor]
    retained: list[Tensor]
    logits: Tensor
    about: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {"inputs": self.inputs, "retained": self.retained, "logits": self.logits, "about": self.about}


def record_trained(model: nn.Module, inputs: Mapping[str, Any], precision: str = "32-true") -> TrainedProbe:
    """Run a model once on the inputs of a probe, with the plan's own budgets. The model is left unchanged.

    Args:
        model: with or without a plan, or a PEFT model around one.
        inputs: processor outputs for one prompt with an image.
        precision: precision of the trainer.
    """
    # Some processors make labels; the loss is not asked for.
    inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}
    base: Any = base_of(model)
    devices = [base.device] if base.device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(inference(model))
        stack.enter_context(torch.random.fork_rng(devices))
        torch.manual_seed(0)  # for pruners that draw
        trace = None
        if is_attached(model):
            stack.enter_context(mode(model, "drop"))
            stack.enter_context(budgets(model, [stage.budget for stage in plan_of(model).stages]))
            trace = stack.enter_context(record(model))
        # Called as it is, not its base, so that sharded weights are gathered.
        out = model(**inputs_for(base, inputs), use_cache=False, logits_to_keep=1)
    retained = [] if trace is None else [stage.retained_RV.cpu() for stage in trace.stages]
    about = {name: str(value) for name, value in environment(base).items()} | {"precision": precision}
    stored = {name: value.detach().cpu() for name, value in inputs.items()}
    return TrainedProbe(stored, retained, out.logits[:, -1].float().cpu(), about)


def check_reload(saved: Mapping[str, Any], model: nn.Module, what: str = "The reloaded model") -> dict[str, Any]:
    """Compare a model with the one that trained.

    Retained tokens and logits must be equal up to rounding where the environment is the same and the precision is that
    of float32. Elsewhere rounding may change a selection, so that only a large difference is an error.

    Args:
        saved: `TrainedProbe.to_dict()` of the checkpoint, or {"reason": why there is none}.
        model: reloaded model, merged or not.
        what: its name in the error.

    Returns:
        For the manifest: `compared`, then `logit_gap`, its `limit` and the `positions` of each stage, or the `reason`.

    Raises:
        ValueError: it behaves differently.
    """
    if "reason" in saved:
        return {"compared": False, "reason": saved["reason"]}
    then = TrainedProbe(**saved)
    now = record_trained(model, then.inputs, then.about["precision"])
    same = now.about == then.about and now.about["dtype"] == "float32" and then.about["precision"] == "32-true"
    limit = (LOGIT_TOLERANCE["float32"] if same else ROUGH) * max(1.0, then.logits.abs().max().item())
    gap = (now.logits - then.logits).abs().max().item() if now.logits.shape == then.logits.shape else float("inf")
    shapes = [x.shape for x in now.retained] == [x.shape for x in then.retained]
    pairs = list(zip(then.retained, now.retained, strict=True)) if shapes else []
    positions = [{"agree": int((was & is_).sum()), "retained": int(was.sum())} for was, is_ in pairs]
    agree = shapes and all(torch.equal(was, is_) for was, is_ in pairs)
    if not gap <= limit or (same and not agree):
        where = "its stages retain other tokens" if not agree else "it retains the same tokens"
        raise ValueError(
            f"{what} is not the one that was trained: {where}, and its logits differ by {gap:.2g} (allowed: "
            f"{limit:.2g}); nothing was exported. Load the same base as in training, and report this if it is the same."
        )
    return {"compared": True, "logit_gap": gap, "limit": limit, "positions": positions}


def try_to_record(model: nn.Module, inputs: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """`record_trained`, as plain values; {"reason": ...} if the model cannot answer the built-in input."""
    try:
        return record_trained(model, inputs, precision).to_dict()
    except Exception as error:  # the forward code of many families; a checkpoint must be written in any case
        return {"reason": f"the model did not answer the built-in probe: {first_line(error)}"}
