"""TensorRT Edge-LLM, which has a pruner of its own (see README.md; read in its documentation, not run)."""

from __future__ import annotations

from typing import Any

from tpcompress.export.runtimes.base import Runtime
from tpcompress.families import family_of
from tpcompress.insertion.plan import PruningPlan

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


class TensorRTEdgeLLM(Runtime):
    """TensorRT Edge-LLM: no plan as it is; a ratio before the language model of Qwen-VL has flags that come near."""

    name = "tensorrt_edge_llm"
    title = "TensorRT Edge-LLM"

    def refuses(self, plan: PruningPlan, config: Any) -> str | None:
        family, stage = family_of(config).name, plan.stages[0]
        if family not in FAMILIES:
            return "it prunes Qwen2.5-VL and Qwen3-VL only, by its own DART on embeddings"
        if plan.positions != "original":
            return "it keeps original positions; train and export with positions: original"
        if len(plan.stages) > 1 or stage.layer > 0 or stage.keep_ratio is None:
            return "it prunes by its own DART on embeddings, before the language model and by a ratio"
        share = f"{1 - stage.keep_ratio:.3g}"
        return (
            f"it prunes by its own DART on embeddings, other tokens than this plan; nearest flags: --visualPrune "
            f"--dartReductionRatio {share}"
        )
