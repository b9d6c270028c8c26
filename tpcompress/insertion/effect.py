"""What a plan makes of a real batch: vision tokens, tokens that each stage retains, sequence lengths.

Only the vision encoder runs: counts follow from the layouts of images, the scope and the budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tpcompress.families import resolve
from tpcompress.insertion.attach import base_of, is_attached, plan_of
from tpcompress.insertion.encode import layouts_of
from tpcompress.insertion.encoded import has_pixels
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.prefill import placeholders, tokens_of_tiles
from tpcompress.insertion.shorten.locate import locate
from tpcompress.insertion.unpruned import span, unpruned_message


@dataclass(frozen=True)
class Effect:
    """What a plan makes of one batch; `str(effect)` is one line per stage.

    Attributes:
        plan: the plan; None for the dense model.
        lengths: tokens of each sample, padding excluded.
        images: vision tokens of each image or video.
        totals: vision tokens of each budget row: of an image, a tile or a prompt, by the scope of the plan.
        owners: sample of each budget row.
        retained: per stage, tokens that each budget row retains; nominal for pruners that choose their own count.
    """

    plan: PruningPlan | None
    lengths: tuple[int, ...]
    images: tuple[int, ...]
    totals: tuple[int, ...]
    owners: tuple[int, ...]
    retained: tuple[tuple[int, ...], ...]

    @property
    def exact(self) -> bool:
        """Whether every pruner retains its budget."""
        return self.plan is None or all(stage.pruner.exact_count for stage in self.plan.stages)

    @property
    def prunes(self) -> bool:
        """Whether a stage retains fewer vision tokens than there are, or may do so."""
        return bool(self.totals) and (not self.exact or (bool(self.retained) and self.retained[-1] != self.totals))

    def vision_tokens(self, stage: int | None = None) -> list[int]:
        """Vision tokens of each sample, before all stages or after one."""
        counts = self.totals if stage is None else self.retained[stage]
        found = [0] * len(self.lengths)
        for owner, count in zip(self.owners, counts, strict=True):
            found[owner] += count
        return found

    def sequence(self, stage: int | None = None) -> list[int]:
        """Tokens of each sample, text included, before all stages or after one."""
        before, after = self.vision_tokens(), self.vision_tokens(stage)
        return [length - b + a for length, b, a in zip(self.lengths, before, after, strict=True)]

    def layer_lengths(self, num_layers: int) -> list[list[int]]:
        """Tokens of each sample in each decoder layer."""
        lengths = [self.sequence()] * num_layers
        for number, stage in enumerate([] if self.plan is None else self.plan.stages):
            lengths[stage.layer :] = [self.sequence(number)] * (num_layers - stage.layer)
        return [list(sample) for sample in zip(*lengths, strict=True)]

    def __str__(self) -> str:
        rows, images = len(self.lengths), len(self.images)
        lines = [
            f"{rows} {'row' if rows == 1 else 'rows'}, {images} {'image' if images == 1 else 'images'}: vision tokens "
            f"{span(self.images)} per image, {span(self.vision_tokens())} per row; sequence {span(self.sequence())}"
        ]
        for number, stage in enumerate(self.plan.stages if self.plan is not None and self.totals else []):
            about = "" if stage.pruner.exact_count else "about "
            lines.append(
                f"stage {number} ({stage.pruner.name}, layer {stage.layer}): retains {about}"
                f"{span(self.retained[number])} of {span(self.totals)} per {self.plan.scope}; "  # type: ignore[union-attr]
                f"sequence {span(self.sequence(number))}"
            )
        return "\n".join(lines)


def effect_of(model: nn.Module, batch: Mapping[str, Any], plan: PruningPlan | None = None) -> Effect:
    """Count what a plan makes of one encoded batch; the images are encoded for it, the language model does not run.

    Args:
        model: a transformers vision-language model, with or without a plan attached, or a PEFT model around one.
        batch: model inputs, as from a processor or a collator; values that are not tensors are ignored.
        plan: the plan; default: the attached one, or none.

    Raises:
        ValueError: unknown family, or a batch without `input_ids`.
    """
    base = base_of(model)
    parts = resolve(base)
    plan = plan_of(base) if plan is None and is_attached(base) else plan
    inputs = {
        name: value.to(base.device, base.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }
    if "input_ids" not in inputs:
        raise ValueError("A batch needs input_ids; give what the processor or a collator returns.")
    ids_BS, mask = inputs["input_ids"], inputs.get("attention_mask")
    B, S = ids_BS.shape
    lengths = mask.bool().sum(1).tolist() if mask is not None and mask.ndim == 2 else [S] * B
    if mask is not None and mask.ndim == 4:  # packed sequences: padding attends to nothing but itself
        lengths = mask[:, 0].diagonal(dim1=1, dim2=2).bool().sum(1).tolist()
    layouts = layouts_of(parts, inputs) if has_pixels(inputs) else {}
    if not any(layout.count for given in layouts.values() for layout in given):
        return Effect(plan, tuple(lengths), (), (), (), () if plan is None else ((),) * len(plan.stages))
    where = (placeholders(parts, inputs), layouts)
    tiles, split, ends = parts.family.tiles, parts.family.splits_tiles, tokens_of_tiles(parts, inputs)
    images = locate(*where, "image", tiles, split, ends)
    rows = images if plan is None or plan.scope == "image" else locate(*where, plan.scope, tiles, split, ends)
    counts = [] if plan is None else [plan.counts(total) for total in rows.total]
    retained = tuple(zip(*counts, strict=True))
    return Effect(plan, tuple(lengths), tuple(images.total), tuple(rows.total), tuple(rows.owner), retained)


def check_prunes(effects: Effect | Sequence[Effect], where: str = "these rows") -> None:
    """Check that a plan shortens at least one row. Rows whose images are small may keep everything.

    Args:
        effects: of one or several batches of one plan.
        where: what the batches are, for the message.

    Raises:
        ValueError: every vision token of every row is retained, with a smaller budget to try.
    """
    given = [effects] if isinstance(effects, Effect) else list(effects)
    totals = [total for effect in given for total in effect.totals]
    plan = given[0].plan if given else None
    if plan is None or not totals or any(effect.prunes for effect in given):
        return
    raise ValueError(unpruned_message(plan, totals, where, [n for effect in given for n in effect.images]))
