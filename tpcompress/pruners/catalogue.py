"""What a reader may want to know of the pruners, read from their classes; no model is built."""

from __future__ import annotations

import inspect
import sys

from tpcompress.pruners.base import Pruner
from tpcompress.pruners.config_mixin import ConfigMixin
from tpcompress.pruners.views import LAYER_VIEWS

COLUMNS = ("site", "reads", "asks", "grad", "merges", "exact", "serving", "paper")
"""The entries of `facts`."""


def facts(rule: Pruner) -> dict[str, str]:
    """A row of the table of all pruners, a word or two each.

    site: layers at which a stage may act; reads: views beside the tokens themselves; asks: the choice depends on the
    prompt; grad: a gradient reaches its scores; serving: A where an engine can take it as a property of its encoder.
    """
    return {
        "site": site(rule),
        "reads": ", ".join(sorted(rule.needs)) or "tokens",
        "asks": "yes" if rule.prompt_dependent else "-",
        "grad": "learns" if rule.learned else "yes" if rule.differentiable else "-",
        "merges": "yes" if rule.merges else "-",
        "exact": "yes" if rule.exact_count else "-",
        "serving": "A" if unserved(rule) is None else "-",
        "paper": rule.paper,
    }


def site(rule: Pruner) -> str:
    """Layers at which a stage with this pruner may act."""
    if rule.needs & LAYER_VIEWS:
        return ">= 1"
    return "0" if "projector" in rule.needs else ">= 0"


def unserved(rule: Pruner) -> str | None:
    """Why an engine cannot take a pruner before the language model as a property of its encoder; None if it can."""
    if rule.keeps_none:
        return f"'{rule.name}' leaves the language model no vision token"
    if rule.needs & LAYER_VIEWS:
        return f"'{rule.name}' reads layers of the language model"
    if rule.prompt_dependent:
        return f"'{rule.name}' reads the prompt, so an image is pruned anew for every question"
    if not rule.exact_count:
        return f"'{rule.name}' counts for itself, so an image has no fixed count"
    if rule.uses_token_sizes:
        return f"'{rule.name}' gives sizes or positions, which the layers of the language model would have to honour"
    return None


def retains(cls: type[Pruner]) -> str:
    """What it retains: the first line of its file, without the name and the source."""
    line = _module_text(cls).partition("\n")[0].partition(": ")[2]
    return line.partition(" (")[0].rstrip(".")


def about(cls: type[ConfigMixin]) -> str:
    """The documentation of a pruner or part: that of its file and of its class."""
    return f"{_module_text(cls)}\n\n{inspect.getdoc(cls) or ''}"


def arguments(cls: type[ConfigMixin]) -> dict[str, str]:
    """Arguments by name, with their defaults as YAML would have them."""
    parameters = inspect.signature(cls.__init__).parameters
    found = {}
    for name in cls.argument_names():
        default = parameters[name].default
        found[name] = "required" if default is inspect.Parameter.empty else str(default)
    return found


def _module_text(cls: type[ConfigMixin]) -> str:
    return inspect.getdoc(sys.modules[cls.__module__]) or ""
