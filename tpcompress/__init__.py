"""tpcompress: fine-tune multimodal LLMs with a vision-token pruner in the loop, and export them with it baked in.

    import tpcompress as tp
    tp.attach(model, tp.PruningPlan([tp.Stage("divprune", keep_tokens=64)]))

Importing it loads torch and transformers, never lightning, deepspeed or datasets: whoever runs a pruned checkpoint
does not pay for training.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from tpcompress.export import export, load, load_processor, verify
from tpcompress.families import list_families
from tpcompress.insertion.attach import attach, budgets, detach, disabled, is_attached, mode, plan_of, record
from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.pruners import Pruner, Selection, TokenView, list_pruners

try:
    __version__ = version("tpcompress")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"

__all__ = [
    "Budget", "Pruner", "PruningPlan", "Selection", "Stage", "StageTrace", "TokenView", "Trace", "attach", "budgets",
    "detach", "disabled", "export", "is_attached", "list_families", "list_pruners", "load", "load_processor", "mode",
    "plan_of", "record", "verify",
]  # fmt: skip
