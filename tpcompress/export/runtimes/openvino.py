"""OpenVINO GenAI, which has a pruner of its own (see README.md; read in its documentation, not run)."""

from __future__ import annotations

from typing import Any

from tpcompress.export.runtimes.base import Runtime
from tpcompress.families import family_of
from tpcompress.insertion.plan import PruningPlan

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class OpenVINO(Runtime):
    """OpenVINO GenAI: no plan as it is; a ratio before the language model of Qwen-VL has a setting that comes near."""

    name = "openvino"
    title = "OpenVINO GenAI"

    def refuses(self, plan: PruningPlan, config: Any) -> str | None:
        family, stage = family_of(config).name, plan.stages[0]
        if family not in FAMILIES:
            return "it prunes Qwen-VL models only, by its own CDPruner"
        if len(plan.stages) > 1 or stage.layer > 0 or stage.keep_ratio is None:
            return "it prunes by its own CDPruner, before the language model and by a ratio"
        share = round(100 * (1 - stage.keep_ratio))
        return f"it prunes by its own CDPruner, other tokens than this plan; nearest setting: pruning_ratio={share}"
