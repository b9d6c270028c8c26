"""`summary`: what the plan on a model does per image, and what a prefill costs against the dense model by formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tpcompress.insertion.attach import attachment_of
from tpcompress.insertion.cost import count_lengths, decoder_flops, has_formula, kv_bytes
from tpcompress.insertion.effect import effect_of
from tpcompress.insertion.plan import PruningPlan


@dataclass(frozen=True)
class Cost:
    """Cost of one prefill with a plan and without it.

    Attributes:
        pruned: cost with the plan.
        dense: cost of the base model.
    """

    pruned: int
    dense: int

    @property
    def share(self) -> float:
        """`pruned / dense`."""
        return self.pruned / self.dense


@dataclass(frozen=True)
class Summary:
    """What a plan does to the vision tokens of one image; `str(summary)` is a table.

    Attributes:
        model: class name of the model.
        plan: attached plan.
        vision_tokens: tokens per image that the projector produces.
        patches: patches per image in the vision encoder; None where the family makes a fixed count of any number.
        text_tokens: text tokens of the prompt that costs are stated for.
        counts: nominal retained tokens after each stage.
        num_layers: decoder layers.
        layer_average: mean vision tokens per decoder layer.
        flops: prefill FLOPs of the decoder layers (`decoder_flops`); None where the formula does not hold.
        kv_bytes: bytes of the KV cache in the model's dtype (`kv_bytes`); None where the formula does not hold.
    """

    model: str
    plan: PruningPlan
    vision_tokens: int
    patches: int | None
    text_tokens: int
    counts: tuple[int, ...]
    num_layers: int
    layer_average: float
    flops: Cost | None
    kv_bytes: Cost | None

    @property
    def reduction(self) -> float:
        """Patches per retained token, or projector tokens where the patches are unknown; infinite if none remain."""
        total = self.vision_tokens if self.patches is None else self.patches
        return total / self.counts[-1] if self.counts[-1] else float("inf")

    def __str__(self) -> str:
        per = self.plan.scope
        chain = [] if self.patches is None else [f"{self.patches} patches"]
        chain += [f"{self.vision_tokens} vision tokens", f"{self.counts[-1]} retained"]
        lines = [f"{self.model}: {' -> '.join(chain)} per {per} ({self.reduction:.4g}x fewer)"]
        rows = [("stage", "layer", "pruner", "budget", "vision tokens")]
        before = self.vision_tokens
        for number, (stage, kept) in enumerate(zip(self.plan.stages, self.counts, strict=True)):
            exact = "" if stage.pruner.exact_count else "about "
            row = (str(number), str(stage.layer), stage.pruner.name, str(stage.budget), f"{before} -> {exact}{kept}")
            rows.append(row)
            before = kept
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        share = self.layer_average / self.vision_tokens
        lines.append(f"layer average: {self.layer_average:.4g} of {self.vision_tokens} vision tokens ({share:.1%})")
        if self.flops is None or self.kv_bytes is None:
            lines.append("prefill FLOPs and KV cache: no formula for this architecture")
            return "\n".join(lines)
        prompt = f"1 image and {self.text_tokens} text tokens"
        lines.append(
            f"prefill of {prompt}: {si(self.flops.pruned)}FLOPs in the decoder layers, {self.flops.share:.1%} of dense"
        )
        lines.append(f"KV cache after it: {si(self.kv_bytes.pruned)}B, {self.kv_bytes.share:.1%} of dense")
        return "\n".join(lines)


def summary(
    model: nn.Module,
    vision_tokens: int | None = None,
    text_tokens: int | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
) -> Summary:
    """Summarize the plan on a model: stages, counts, layer average, FLOPs and KV-cache bytes against dense.

    The language model is not run: counts are nominal, FLOPs and bytes follow the formulas of
    `tpcompress.insertion.cost`.

    Args:
        model: with a plan attached.
        vision_tokens: tokens per image that the projector produces (per tile or prompt under such a scope); default:
            that of the config, for families that resize all images to one size.
        text_tokens: text tokens of the prompt; default: 64, or those of `inputs`.
        inputs: what the processor returns for a real row, whose first image and text are counted.

    Raises:
        ValueError: no plan attached, neither `vision_tokens` nor `inputs` where image sizes vary, both of them, or
            `inputs` without an image.
    """
    attached = attachment_of(model)
    parts, plan = attached.parts, attached.plan
    config: Any = parts.model.config
    if inputs is not None:
        if vision_tokens is not None:
            raise ValueError("Both vision_tokens and inputs are given; give one of them.")
        vision_tokens, counted = _counted(model, inputs)
        text_tokens = counted if text_tokens is None else text_tokens
    text_tokens = 64 if text_tokens is None else text_tokens
    tokens = vision_tokens if vision_tokens is not None else parts.family.tokens_per_image(config)
    if tokens is None:
        raise ValueError(
            f"{type(parts.model).__name__} makes another number of vision tokens of every image size; give a row, "
            f"tp.summary(model, inputs=processor(images=..., text=..., return_tensors='pt')), or vision_tokens=576."
        )
    if isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"vision_tokens must be at least 1, got {tokens!r}.")
    num_layers, merged = len(parts.layers), parts.family.patches_per_token(config)
    flops = cache = None
    if has_formula(config):
        pruned, dense = (count_lengths(p, text_tokens, tokens, num_layers) for p in (plan, None))
        flops = Cost(decoder_flops(config, pruned, 1), decoder_flops(config, dense, 1))
        cache = Cost(*(kv_bytes(config, lengths, parts.model.dtype) for lengths in (pruned, dense)))
    return Summary(
        type(parts.model).__name__, plan, tokens, None if merged is None else tokens * merged, text_tokens,
        tuple(plan.counts(tokens)), num_layers, plan.layer_average(tokens, num_layers), flops, cache,
    )  # fmt: skip


def _counted(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Vision tokens of the first budget row of processed inputs, and text tokens of its sample."""
    effect = effect_of(model, inputs)
    if not effect.totals:
        raise ValueError("inputs have no image; give what the processor returns for a prompt with one.")
    owner = effect.owners[0]
    return effect.totals[0], effect.lengths[owner] - effect.vision_tokens()[owner]


def si(value: int) -> str:
    """A number with three digits and an SI prefix."""
    amount, prefixes = float(value), ["", "k", "M", "G", "T", "P"]
    while amount >= 1000 and len(prefixes) > 1:
        amount /= 1000
        prefixes.pop(0)
    return f"{amount:.3g} {prefixes[0]}"
