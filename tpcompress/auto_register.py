"""Register the classes of exported folders when transformers first looks for one, without importing it before.

`AutoConfig` finds the config class of a `model_type` in a mapping of registered classes. That mapping is replaced by
one which imports `tpcompress.export` when a model type of an export is looked up; that registers all of them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

CONFIGS = "transformers.models.auto.configuration_auto"
PREFIX = "tpcompress_"
"""Start of the model types of exported folders."""


class RegisteredConfigs(dict[str, Any]):
    """Config classes that were registered with `AutoConfig`; those of exports are registered when one is looked up."""

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key.startswith(PREFIX):
            importlib.import_module("tpcompress.export")
        return super().__contains__(key)


class _AfterImport(MetaPathFinder):
    """Replaces the mapping right after transformers has imported the module that holds it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != CONFIGS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_replace(module: ModuleType) -> None:
            load(module)
            _replace(module)

        spec.loader.exec_module = load_and_replace  # type: ignore[method-assign]
        return spec


def register_on_demand() -> None:
    """Prepare the registration, whether transformers has been imported or not."""
    if CONFIGS in sys.modules:
        _replace(sys.modules[CONFIGS])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _replace(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = RegisteredConfigs(mapping._extra_content)
