"""Qwen3.5, dense and MoE: most decoder layers are linear attention, whose state is updated by retained tokens only."""

from __future__ import annotations

from dataclasses import replace

from transformers import Qwen3_5Config, Qwen3_5MoeConfig

from tpcompress.families.base import Tiny
from tpcompress.families.qwen2_vl import SIZES, tiny_ids, tiny_pixels, token_types
from tpcompress.families.qwen3_vl import EXPERTS, INTERLEAVED, QWEN3_VL, stamped_run, tiny_processor, tiny_tower
from tpcompress.families.tiny import tiny_text

# ------------------------------------------------------------------------------------------------ test fixture


def tiny_config(moe: bool = False) -> Qwen3_5Config | Qwen3_5MoeConfig:
    """64 tokens per image, full attention in layers 1 and 4, half of a head rotated; `moe` as in Qwen3-VL."""
    kind, make = ("qwen3_5_moe_text", Qwen3_5MoeConfig) if moe else ("qwen3_5_text", Qwen3_5Config)
    linear = {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"] * 2, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    }  # fmt: skip
    rope = INTERLEAVED | {"partial_rotary_factor": 0.5}
    experts = EXPERTS | {"shared_expert_intermediate_size": 24} if moe else {}
    return make(
        text_config=tiny_text(kind, head_dim=32, rope_parameters=rope, **linear, **experts),
        vision_config=tiny_tower(),
        **tiny_ids(),
    )


# ------------------------------------------------------------------------------------------------------ family

QWEN3_5 = replace(
    QWEN3_VL,
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_moe"),
    tiny=Tiny(tiny_config, tiny_pixels, stamped_run, tuple(SIZES), token_types, ((), (True,)), tiny_processor),
)
