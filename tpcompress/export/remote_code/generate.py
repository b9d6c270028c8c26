"""Generates the Python files that an export carries, so that it loads without tpcompress.

They are copies of what a plan needs of this package: its pruners, the family of its model, and what these and the entry
point refer to. Sets of files, which the package finds by looking into a folder, become tables.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from tpcompress.export.classes import AUTO_CLASSES, class_name, stock_class
from tpcompress.export.remote_code.closure import CannotCarryCode, Closure, Name
from tpcompress.export.remote_code.source import Module, parse, read_module
from tpcompress.export.remote_code.writing import flat, header, text_of
from tpcompress.families import list_families
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.views.registry import providers
from tpcompress.pruners.config_mixin import ConfigMixin
from tpcompress.pruners.views import VIEWS

ENTRY = "modeling_tpcompress"
"""The generated module that `auto_map` in config.json names."""
REQUIRES = ("torch>=2.9", "transformers>=5.23,<6")
"""Versions that the package and its exports run with."""
CLASSES = "tpcompress.export.classes"
OPEN_SET = "tpcompress.open_set"

ENTRY_TEXT = '''"""{stock} with its vision-token pruner, for `trust_remote_code=True` where tpcompress is not installed.

These files are the part of tpcompress that this folder's plan needs. Where tpcompress is imported, they are not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.utils.versions import require_version

for needed in {requires}:  # before the imports below, which may fail under others
    require_version(needed)

from .{classes} import exported_config, exported_model  # noqa: E402

if TYPE_CHECKING:  # transformers copies the files that lines of this form name
{copied}

{config} = exported_config("{model_type}", __name__)
{model} = exported_model({config}, __name__)
'''

TABLE = '''MODULES: dict[str, tuple[str, ...]] = {{
{rows}
}}
"""The files of each set that the plan of this folder needs."""


def modules_in(package: str) -> list[ModuleType]:
    """The files of a set that the plan of this folder needs."""
    return [importlib.import_module(f".{{name}}", __package__) for name in MODULES.get(package, ())]
'''


@dataclass(frozen=True)
class Code:
    """The Python files of an export.

    Attributes:
        files: text by file name.
        auto_map: what config.json holds under `auto_map`.
    """

    files: dict[str, str]
    auto_map: dict[str, str]


def code_of(plan: PruningPlan, model_type: str) -> Code:
    """The Python files that an export needs to load without tpcompress.

    Args:
        plan: its plan.
        model_type: stock model type of its base.

    Raises:
        CannotCarryCode: a pruner from outside the package, or a file that imports more than torch, transformers and
            safetensors.
    """
    sets: dict[str, set[Name]] = {"tpcompress.families": {_family(model_type)}, "tpcompress.insertion.views": set()}
    for module in _modules(plan):
        cls = type(module)
        if not cls.__module__.startswith("tpcompress.pruners."):
            raise CannotCarryCode(f"'{cls.__module__}.{cls.__qualname__}' is not part of tpcompress")
        sets.setdefault(cls.__module__.rpartition(".")[0], set()).add((cls.__module__, cls.__name__))
        for view in sorted(getattr(module, "needs", ())):
            if view in VIEWS:
                sets["tpcompress.insertion.views"].add(_view(view))
    key = tuple((package, tuple(sorted(names))) for package, names in sorted(sets.items()) if names)
    files, stock = _files(key, model_type), stock_class(model_type)
    model = f"{ENTRY}.{class_name(stock)}"
    config = f"{ENTRY}.{class_name(stock.config_class)}"
    return Code(dict(files), {"AutoConfig": config, **{name: model for name in AUTO_CLASSES if _is_auto(name, stock)}})


def code_or_reason(plan: PruningPlan, model_type: str) -> tuple[Code | None, str | None]:
    """The code of an export, or the reason why it can have none; see `code_of`."""
    try:
        return code_of(plan, model_type), None
    except CannotCarryCode as error:
        return None, str(error)


def _is_auto(name: str, stock: type[Any]) -> bool:
    import transformers

    return getattr(transformers, name)._model_mapping.get(stock.config_class, None) is stock


@cache
def _files(sets: tuple[tuple[str, tuple[Name, ...]], ...], model_type: str) -> Mapping[str, str]:
    """The files for some members of sets."""
    table = {package: sorted({flat(module) for module, _ in names}) for package, names in sets}

    opened = _open_set(table)
    closure = Closure(lambda name: opened if name == OPEN_SET else read_module(name))
    closure.add([(CLASSES, "exported_config"), (CLASSES, "exported_model")])
    closure.add([name for _, names in sets for name in names])
    found = {f"{flat(name)}.py": text_of(needed, closure) for name, needed in sorted(closure.modules.items())}
    stock = stock_class(model_type)
    entry = ENTRY_TEXT.format(
        stock=stock.__name__,
        classes=flat(CLASSES),
        requires=repr(REQUIRES).replace("'", '"'),
        copied="\n".join(f"    from .{name.removesuffix('.py')} import *  # noqa: F403" for name in found),
        config=class_name(stock.config_class),
        model=class_name(stock),
        model_type=model_type,
    )
    return {f"{ENTRY}.py": header("tpcompress/export/remote_code/generate.py") + entry, **found}


def _open_set(table: Mapping[str, list[str]]) -> Module:
    """The module that finds the files of a set, with a table instead of a look into a folder."""
    source = read_module(OPEN_SET)
    scan = source.definitions["modules_in"]
    rows = "\n".join(f'    "{package}": ({", ".join(repr(n) for n in names)},),' for package, names in table.items())
    text = source.text[: scan.start] + TABLE.format(rows=rows.replace("'", '"')).encode() + source.text[scan.end :]
    return parse(OPEN_SET, source.path, text)


def _family(model_type: str) -> Name:
    """Where the family of a model type is described."""
    for family in list_families().values():
        if model_type in family.model_types:
            module = read_module(family.tiny.config.__module__)
            for name in module.definitions:
                if re.fullmatch(r"[A-Z][A-Z0-9_]*", name) and _value(module.name, name) is family:
                    return module.name, name
    raise CannotCarryCode(f"no family file describes '{model_type}'")


def _view(name: str) -> Name:
    """Where a view is provided."""
    provider = providers()[name]
    function: Any = provider.capture.make if provider.capture is not None else provider.provide
    return function.__module__, function.__name__


def _value(module: str, name: str) -> Any:
    import importlib

    return getattr(importlib.import_module(module), name, None)


def _modules(plan: PruningPlan) -> Iterator[ConfigMixin]:
    """The pruners of a plan with all pruners and components inside them."""
    for stage in plan.stages:
        yield from _inside(stage.pruner)


def _inside(value: Any) -> Iterator[ConfigMixin]:
    if isinstance(value, ConfigMixin):
        yield value
    if isinstance(value, nn.Module):
        for inner in [*vars(value).values(), *value.children()]:
            yield from _inside(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _inside(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _inside(inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for inner in vars(value).values():
            yield from _inside(inner)
