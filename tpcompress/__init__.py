"""tpcompress: fine-tune multimodal LLMs with a vision-token pruner in the loop, and export them with it baked in.

    import tpcompress as tp

    tp.attach(model, "divprune", keep_tokens=64)
    model.generate(**inputs)
    print(tp.summary(model))

Importing the package loads torch and transformers, but not the training frameworks (lightning, deepspeed, datasets).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tpcompress.export import load, load_processor, save_pretrained, verify
from tpcompress.export import load as from_pretrained
from tpcompress.families import list_families
from tpcompress.insertion.attach import attach, budgets, detach, disabled, is_attached, mode, plan_of, record
from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.insertion.summary import Summary, summary
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.pruners import Pruner, Selection, TokenView
from tpcompress.pruners.listing import list_pruners
from tpcompress.version import __version__ as __version__

if TYPE_CHECKING:  # at run time `tpcompress.export` is the package, which can be called
    from tpcompress.export import export
    from tpcompress.training.own_loop import ScheduleCallback, schedule_step

__all__ = [
    "Budget", "Pruner", "PruningPlan", "ScheduleCallback", "Selection", "Stage", "StageTrace", "Summary",
    "TokenView", "Trace", "attach", "budgets", "detach", "disabled", "export", "from_pretrained", "is_attached",
    "list_families", "list_pruners", "load", "load_processor", "mode", "plan_of", "record", "save_pretrained",
    "schedule_step", "summary", "verify",
]  # fmt: skip

LAZY = {name: "tpcompress.training.own_loop" for name in ("ScheduleCallback", "schedule_step")}
"""Names that are imported on first use, because their modules load transformers' trainer."""


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
