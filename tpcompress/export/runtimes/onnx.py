"""ONNX Runtime: the image side of an export as one graph with fixed counts (`tpcompress.export.onnx`).

The tables are measured: `tests/export/test_onnx.py` makes every graph of them, or sees it refused.
"""

from __future__ import annotations

from typing import Any

from tpcompress.export.runtimes.base import Runtime, outside_encoder
from tpcompress.families import family_of
from tpcompress.insertion.plan import PruningPlan

GRID = "its tower splits attention by the values of a grid, which a graph does not know"
PADDING = "its encoder leaves out padding images by their pixels, which a graph does not know"
HOST = "it reads its budget on the host, which the exporter does not follow"
PRUNERS: dict[str, str] = {
    "cdpruner": "yes",
    "divprune": "yes",
    "dtd": "yes",
    "evs": "yes",
    "fastervlm": "yes",
    "flashvid": HOST,
    "globalcom2": "yes",
    "hiprune": "yes",
    "hired": "yes",
    "holov": "yes",
    "learned_gate": "yes",
    "merged": "yes",
    "mix": "yes",
    "mmr": "yes",
    "novelty": "yes",
    "pool": "yes",
    "prumerge": "yes",
    "quota": "yes",
    "random": "yes",
    "restore": "ONNX Runtime has no `Where` for one of its types",
    "scope": "yes",
    "tofu": HOST,
    "tome": HOST,
    "tops": "yes",
    "uniform": "yes",
    "vidcom2": "yes",
    "visionzip": "yes",
    "vispruner": "yes",
    "window": "yes",
    "window_merge": "yes",
}
"""Pruners that are part of an encoder: `yes`, or why there is no graph."""
FAMILIES: dict[str, str] = {
    "aya_vision": "yes",
    "cohere2_vision": "yes",
    "deepseek_vl": "yes",
    "ernie4_5_vl_moe": GRID,
    "gemma3": "yes",
    "gemma4": "yes",
    "gemma4_unified": "yes",
    "glm4v": GRID,
    "got_ocr2": "yes",
    "idefics2": "yes",
    "idefics3": PADDING,
    "internvl": "yes",
    "janus": "yes",
    "lfm2_vl": "yes",
    "llava": "yes",
    "llava_next": "yes",
    "llava_next_video": "yes",
    "llava_onevision": "yes",
    "mistral3": "ONNX Runtime does not load the graph of its patch merger",
    "ovis2": "yes",
    "paddleocr_vl": GRID,
    "paligemma": "yes",
    "qwen2_5_vl": GRID,
    "qwen2_vl": GRID,
    "qwen3_5": GRID,
    "qwen3_vl": "its encoder also feeds inner layers of the language model (DeepStack)",
    "smolvlm": PADDING,
    "video_llava": "yes",
    "vipllava": "yes",
}
"""Families: `yes`, or why there is no graph of one image."""


class ONNXRuntime(Runtime):
    """ONNX Runtime: one stage before the language model, by a pruner and on a family whose graphs were made."""

    name = "onnx"
    title = "ONNX"

    def refuses(self, plan: PruningPlan, config: Any) -> str | None:
        reason = outside_encoder(plan)
        if reason is not None:
            return reason
        family, pruner = family_of(config).name, plan.stages[0].pruner.name
        untried = "no graph was tried"
        for what, found in ((family, FAMILIES.get(family, untried)), (pruner, PRUNERS.get(pruner, untried))):
            if found != "yes":
                return f"no graph of '{what}': {found}"
        return None
