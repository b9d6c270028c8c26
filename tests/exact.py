"""The one comparison that the exactness tests share."""

from __future__ import annotations

from typing import Any

import torch
from reference import Reference, aligned
from support import answer_labels

from tpcompress.insertion.attach import attach, mode, record
from tpcompress.insertion.plan import PruningPlan


def tolerance(model: Any) -> float:
    """1e-5, unless rounding alone moves the base further.

    The gated delta rule adds up in chunks: a sample of a padded batch differs by 4e-4 from the sample alone. Gemma 4's
    attention has no scale: fp32 differs by 2e-4 from fp64. (LLaVA: 4e-6.)
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if "linear_attention" in kinds:
        return 2e-3
    return 5e-4 if model.config.model_type.startswith("gemma4") else 1e-5


def check(
    model: Any, base: Any, plan: PruningPlan, inputs: dict[str, Any], words: int = 4, modes: tuple[str, ...] = ("mask",)
) -> dict[str, float]:
    """Attached logits and loss against the reference, and the control that something was pruned.

    Args:
        model, base: two copies of one model; the first gets the plan.
        plan: what to attach.
        inputs: of one call.
        words: words at the end that have labels.
        modes: modes beside `drop` that must agree with it.

    Returns:
        The largest deviations, by name.
    """
    attach(model, plan)
    labels = answer_labels(inputs, words)
    mask = inputs.get("attention_mask")
    with record(model) as trace, torch.no_grad():
        out = model(**inputs, labels=labels)
    assert len(trace.stages) == len(plan.stages)
    reference = Reference.of(trace, inputs, base, plan.positions == "compact")
    with torch.no_grad():
        untouched = base(**inputs, labels=labels)
        with reference.on(base, inputs):
            full = base(**inputs, labels=labels)
    width = out.logits.shape[1]
    real = torch.ones_like(reference.kept) if mask is None else mask.bool()
    kept = reference.kept & real
    assert width == int(kept.sum(1).max()) == trace.stages[-1].sequence_out < inputs["input_ids"].shape[1]
    expected, compared = aligned(full.logits, kept, width)
    gaps = {
        "logits": (out.logits - expected)[compared].abs().max().item(),
        "loss": abs(out.loss - full.loss).item(),
    }
    plain, _ = aligned(untouched.logits, kept, width)
    assert (plain - expected)[compared].abs().max() > 0.05, "control: pruning must change the logits"
    for name in modes:
        with mode(model, name), record(model) as masked, torch.no_grad():
            hidden = model(**inputs, labels=labels)
        for a, b in zip(trace.stages, masked.stages, strict=True):
            assert torch.equal(a.retained_RV, b.retained_RV), "drop and mask must retain the same tokens"
            assert b.sequence_out == inputs["input_ids"].shape[1]
        gaps[f"logits, {name}"] = (hidden.logits - full.logits)[kept].abs().max().item()
        gaps[f"loss, {name}"] = abs(hidden.loss - full.loss).item()
    assert max(gaps.values()) < tolerance(model), gaps
    return gaps
