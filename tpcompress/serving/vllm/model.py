"""Model side: vLLM's own class of the family, whose encoder outputs go through the plan's pruner.

With original positions, retained tokens carry their offset from the start of their row in further columns.
vLLM's runner gives the position of that start (through its interface for M-RoPE models, which also serves models with
one position per token); the offsets are added in `forward`. No part of this depends on the prompt.

N tokens of a step, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tpcompress.export.model import stored_plan
from tpcompress.export.weights import STEM, WEIGHTS
from tpcompress.insertion.attach import PRUNERS
from tpcompress.insertion.features import prune_features
from tpcompress.serving.vllm.adapter import Adapter, adapter_of
from tpcompress.serving.vllm.counts import CHANNELS, item_layouts, prompt_positions, read_offsets, row_offsets
from tpcompress.serving.vllm.processor import ROWS, read_rows
from tpcompress.serving.vllm.rotary import extend_rotary


class PrunedModel:
    """Precedes vLLM's model class."""

    supports_mrope: ClassVar[bool] = True
    allow_patterns_overrides: ClassVar[list[str]] = [WEIGHTS, f"{STEM}-*-of-*.safetensors"]
    """The only weight files that are read."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        self.plan, self.adapter = stored_plan(config, allow_outside=False), adapter_of(config)
        pruner = self.plan.stages[0].pruner
        pruner.build(config.get_text_config().hidden_size)
        setattr(self, PRUNERS, nn.ModuleList([pruner.float().eval()]))
        self.keeps_positions = self.plan.positions == "original"
        if self.keeps_positions:
            # The prompt ends at most at the model's last position, before pruning, and an answer may fill what pruning
            # left free of the context.
            last = config.get_text_config().max_position_embeddings + vllm_config.model_config.max_model_len
            extend_rotary(self.get_language_model(), last)  # type: ignore[attr-defined]
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.offsets_3N = torch.zeros(3, most + 1, dtype=torch.int64)

    # ------------------------------------------------------------------------------------------------ encoder

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Features of the retained tokens of each item, with their offsets if positions are kept."""
        given = kwargs.pop(ROWS, None)
        features = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if features is None or len(features) == 0:
            return features
        if given is None:
            raise ValueError("Precomputed embeddings cannot be pruned; send images.")
        return self._prune([x.reshape(-1, x.shape[-1]) for x in features], given, kwargs)

    def _prune(self, features: Sequence[Tensor], given: Sequence[Tensor], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        adapter: Adapter = self.adapter
        config: Any = self.config  # type: ignore[attr-defined]
        modality = "video" if any(name in kwargs for name in ("pixel_values_videos", "video_embeds")) else "image"
        fields = [
            {name: torch.as_tensor(kwargs[name][i])[None] for name in adapter.fields if name in kwargs}
            for i in range(len(features))
        ]
        layouts = [
            item_layouts(adapter, config, modality, each, len(x)) for each, x in zip(fields, features, strict=True)
        ]
        stage, width = self.plan.stages[0], config.get_text_config().hidden_size
        joined_SD = torch.cat(list(features))
        # Further columns are features for later layers (DeepStack), which retained tokens keep.
        index_N, tokens_SD = prune_features(
            getattr(self, PRUNERS)[0], stage.budget, self.plan.scope, joined_SD[:, :width],
            [layout for each in layouts for layout in each],
        )  # fmt: skip
        kept_ND = torch.cat([tokens_SD, joined_SD[:, width:]], 1)[index_N]
        rows = [read_rows(each) for each in given]
        counts = [sum(row.kept for row in each) for each in rows]
        found, start = list(kept_ND.split(counts)), 0
        if self.keeps_positions:
            for i, item_N in enumerate(index_N.split(counts)):
                positions = None if adapter.positions is None else adapter.positions(config, modality, fields[i])
                digits_NC = row_offsets(item_N - start, rows[i], positions)
                found[i] = torch.cat([found[i], digits_NC.to(found[i].dtype)], 1)
                start += len(features[i])
        return tuple(found)

    # ---------------------------------------------------------------------------------------------- positions

    def get_mrope_input_positions(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt, in which a retained token has that of the start of its row."""
        items = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place = feature.mm_position
            embed_L = torch.ones(place.length, dtype=torch.bool) if place.is_embed is None else place.is_embed
            items.append((place.offset, embed_L, read_rows(feature.data[ROWS].data)))
        return prompt_positions(len(input_tokens), items)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Token embeddings, with the features in their places; their offsets are kept for `forward`."""
        found = multimodal_embeddings
        if self.keeps_positions:
            self.offsets_3N[:, : len(input_ids)] = 0
            if found is not None and len(found) and is_multimodal is not None:
                offsets_3M = read_offsets(torch.cat([x[:, -CHANNELS:] for x in found]))
                self.offsets_3N[:, : len(input_ids)][:, is_multimodal.to(self.offsets_3N.device)] = offsets_3M
                found = [x[:, :-CHANNELS] for x in found]
        more = {} if found is None else {"multimodal_embeddings": found, "is_multimodal": is_multimodal}
        return super().embed_input_ids(input_ids, **more)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """vLLM's forward at the positions of the retained tokens."""
        if self.keeps_positions and positions.ndim == 2:
            positions = positions + self.offsets_3N[:, : positions.shape[1]]
            self.offsets_3N.zero_()
            if self.adapter.positions is None:
                positions = positions[0]
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------------ loading

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the stock weights as vLLM does, and the pruner's."""
        own: dict[str, Tensor] = {}

        def stock() -> Iterable[tuple[str, Tensor]]:
            for name, value in weights:
                if name.startswith(f"{PRUNERS}."):
                    own[name.removeprefix(f"{PRUNERS}.")] = value
                else:
                    yield self._renamed(name), value

        loaded = super().load_weights(stock())  # type: ignore[misc]
        getattr(self, PRUNERS).load_state_dict(own)
        return loaded | {f"{PRUNERS}.{name}" for name in own}

    def _renamed(self, name: str) -> str:
        for old, new in self.adapter.rename.items():
            if name.startswith(old) and not name.startswith(new):
                return new + name.removeprefix(old)
        return name

    def get_encoder_cudagraph_config(self) -> Any:
        """No CUDA graphs of the encoder, which would bypass `embed_multimodal`."""
        from dataclasses import replace

        return replace(super().get_encoder_cudagraph_config(), modalities=[])  # type: ignore[misc]
