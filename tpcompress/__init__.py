"""tpcompress: fine-tune multimodal LLMs with a vision-token pruner in the loop, and export them with it baked in.

    import tpcompress as tp

    tp.attach(model, "divprune", keep_tokens=64)
    model.generate(**inputs)
    print(tp.summary(model))

Importing the package loads neither torch nor transformers: each name is imported at its first use, and the classes of
exported folders are registered with transformers when it first looks for one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tpcompress.auto_register import register_on_demand
from tpcompress.version import __version__ as __version__

if TYPE_CHECKING:
    from tpcompress.export import export, load, load_processor, save_pretrained, verify
    from tpcompress.export import load as from_pretrained
    from tpcompress.families import list_families
    from tpcompress.insertion.attach import attach, budgets, detach, disabled, is_attached, mode, plan_of, record
    from tpcompress.insertion.plan import Budget, PruningPlan, Stage
    from tpcompress.insertion.summary import Summary, summary
    from tpcompress.insertion.trace import StageTrace, Trace
    from tpcompress.pruners import Pruner, Selection, TokenView
    from tpcompress.pruners.listing import list_pruners
    from tpcompress.training.own_loop import ScheduleCallback, TrainerMixin, schedule_step, trainable

__all__ = [
    "Budget", "Pruner", "PruningPlan", "ScheduleCallback", "Selection", "Stage", "StageTrace", "Summary",
    "TokenView", "Trace", "TrainerMixin", "attach", "budgets", "detach", "disabled", "export", "from_pretrained",
    "is_attached", "list_families", "list_pruners", "load", "load_processor", "mode", "plan_of", "record",
    "save_pretrained", "schedule_step", "summary", "trainable", "verify",
]  # fmt: skip

MODULES = {
    "export": ("load", "load_processor", "save_pretrained", "verify"),
    "families": ("list_families",),
    "insertion.attach": ("attach", "budgets", "detach", "disabled", "is_attached", "mode", "plan_of", "record"),
    "insertion.plan": ("Budget", "PruningPlan", "Stage"),
    "insertion.summary": ("Summary", "summary"),
    "insertion.trace": ("StageTrace", "Trace"),
    "pruners": ("Pruner", "Selection", "TokenView"),
    "pruners.listing": ("list_pruners",),
    "training.own_loop": ("ScheduleCallback", "TrainerMixin", "schedule_step", "trainable"),
}
"""Public names by the module that defines them."""

WHERE = {name: module for module, names in MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "export":  # the package, which can be called
        return importlib.import_module("tpcompress.export")
    found = "load" if name == "from_pretrained" else name
    if found not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"tpcompress.{WHERE[found]}"), found)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_on_demand()
