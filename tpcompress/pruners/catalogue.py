"""Facts, documentation and paper plans of pruners and gate components, read from their classes; no model is built."""

from __future__ import annotations

import inspect
import sys

from tpcompress.pruners.base import Pruner
from tpcompress.pruners.config_mixin import ConfigMixin
from tpcompress.pruners.registry import list_pruners
from tpcompress.pruners.views import LAYER_VIEWS

COLUMNS = ("site", "reads", "asks", "grad", "merges", "exact", "serving", "paper")
"""The entries of `facts`."""


def facts(rule: Pruner) -> dict[str, str]:
    """One row of the table of all pruners, a word or two per column.

    site: layers at which a stage may act; reads: views besides the tokens themselves; asks: the selection depends on
    the prompt; grad: a gradient reaches the scores; serving: A if an engine can run it as part of its encoder.
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
    """Reason why an engine cannot run a pruner at layer 0 as part of its encoder; None if it can."""
    if rule.keeps_none:
        return f"'{rule.name}' leaves the language model no vision token"
    if rule.needs & LAYER_VIEWS:
        return f"'{rule.name}' reads layers of the language model"
    if rule.prompt_dependent:
        return f"'{rule.name}' reads the prompt, so an image is pruned again for every question"
    if not rule.exact_count:
        return f"'{rule.name}' chooses its own count, so an image has no fixed count"
    if rule.uses_token_sizes:
        return f"'{rule.name}' returns sizes or positions, which the layers of the language model would have to apply"
    return None


def retains(cls: type[Pruner]) -> str:
    """Summary: the first line of the pruner's file, without name and source."""
    line = _module_text(cls).partition("\n")[0].partition(": ")[2]
    return line.partition(" (")[0].rstrip(".")


def groups() -> dict[str, list[str]]:
    """Names of the registered pruners by group, in alphabetical order of both."""
    found: dict[str, list[str]] = {}
    for name, cls in list_pruners().items():
        found.setdefault(cls.group, []).append(name)
    return dict(sorted(found.items()))


def paper_plans() -> dict[str, str]:
    """YAML text of every plan with the settings of a paper, by name: each pruner's own, and its further ones."""
    return {name: text for cls in list_pruners().values() for name, text in plans_of(cls).items()}


def plans_of(cls: type[Pruner]) -> dict[str, str]:
    """The paper plans of one pruner, by name; empty if it declares none."""
    own = {cls.name: cls.paper_plan} if cls.paper_plan else {}
    return {name: inspect.cleandoc(text) + "\n" for name, text in (own | dict(cls.more_plans)).items()}


def about(cls: type[ConfigMixin]) -> str:
    """Documentation of a pruner or gate component: the docstrings of its file and of its class."""
    return f"{_module_text(cls)}\n\n{inspect.getdoc(cls) or ''}"


def arguments(cls: type[ConfigMixin]) -> dict[str, str]:
    """Arguments by name, with their defaults as text; `required` where there is none."""
    parameters = inspect.signature(cls.__init__).parameters
    found = {}
    for name in cls.argument_names():
        default = parameters[name].default
        found[name] = "required" if default is inspect.Parameter.empty else str(default)
    return found


def _module_text(cls: type[ConfigMixin]) -> str:
    return inspect.getdoc(sys.modules[cls.__module__]) or ""
