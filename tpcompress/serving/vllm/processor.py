"""Processor side: as many placeholders as tokens are retained, and the budget rows of each item for the model side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpcompress.export.model import stored_plan
from tpcompress.serving.vllm.adapter import Adapter, adapter_of
from tpcompress.serving.vllm.counts import ItemRow, item_rows, shortened

ROWS = "token_pruning_rows"
"""Field of an item with its budget rows: placeholders, kept, span."""


def read_rows(values: Tensor) -> list[ItemRow]:
    """Budget rows from the field `ROWS` of an item."""
    return [ItemRow(*row) for row in values.tolist()]


class PrunedInfo:
    """Precedes vLLM's processing info: only what can be served, and limits from shortened prompts."""

    ctx: Any

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """vLLM's limits, 0 for modalities that the adapter does not serve."""
        limits = super().get_supported_mm_limits()  # type: ignore[misc]
        served = adapter_of(self.ctx.get_hf_config()).modalities
        return {name: most if name in served else 0 for name, most in limits.items()}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """None: vLLM counts the placeholders of dummy items, which the processor shortens."""
        return None


class PrunedProcessor:
    """Precedes vLLM's multimodal processor."""

    info: Any

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        """Also check that the last position exists: with original positions it is that of the unpruned prompt.

        Raises:
            ValueError: the prompt is too long before pruning.
        """
        prompt, places = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        config = self.info.ctx.get_hf_config()
        most = config.get_text_config().max_position_embeddings
        skipped = sum(
            getattr(update.content, "skipped", 0)
            for items in mm_res.prompt_updates.values()
            for found in items
            for update in found
        )
        if stored_plan(config, allow_outside=False).positions == "original" and len(prompt) + skipped > most:
            raise ValueError(
                f"The prompt has {len(prompt)} tokens at positions up to {len(prompt) + skipped}, as before pruning, "
                f"and the model has {most} positions; send fewer or smaller images, or export with positions: compact."
            )
        return prompt, places

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates = super()._get_mm_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        config = self.info.ctx.get_hf_config()
        plan, adapter = stored_plan(config, allow_outside=False), adapter_of(config)
        for modality, items in updates.items():
            if not items:  # every item of this modality is cached, with its shortened updates
                continue
            for found, fields in zip(items, out_mm_kwargs[modality], strict=True):
                found[:] = [self._pruned(update, plan, adapter, config, fields) for update in found]
        return updates

    def _pruned(self, update: Any, plan: Any, adapter: Adapter, config: Any, item: Any) -> Any:
        """One resolved update with fewer placeholders; the item gets its budget rows."""
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalFieldElem

        content = update.content
        embeds = [True] * len(content.full) if content.is_embed is None else content.is_embed(content.full).tolist()
        fields = {name: torch.as_tensor(item[name].data)[None] for name in adapter.fields if name in item}
        rows = item_rows(plan, adapter, config, update.modality, fields, sum(embeds))
        field = MultiModalFieldConfig.batched(update.modality, keep_on_cpu=True).field
        values = torch.tensor([[row.placeholders, row.kept, row.span] for row in rows])
        item[ROWS] = MultiModalFieldElem(data=values, field=field)
        short = replace(content, full=shortened(content.full, embeds, rows))
        short.skipped = sum(row.span - row.kept for row in rows)
        return replace(update, content=short)
