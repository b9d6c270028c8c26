"""Registers the classes of exported folders with transformers: one config and one model class per family.

A folder's `model_type` is `tpcompress_<stock model type>`, so that it cannot be loaded without the plan. Config classes
are registered when `AutoConfig` first looks for one of them, without importing modeling code. The model class is
registered when the first config of its family is created, which happens before `AutoModelForImageTextToText` looks for
it. Both win over the code that a folder carries, which runs only where tpcompress is not imported.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tpcompress.auto_register import PREFIX as PREFIX
from tpcompress.export.classes import (
    AUTO_CLASSES,
    ExportedConfig,
    class_name,
    exported_config,
    exported_model,
    stock_class,
)
from tpcompress.families import list_families


class RegisteringConfig(ExportedConfig):
    """Mixin of the package's config classes: the first one of a family registers its model class."""

    def __post_init__(self, **values: Any) -> None:
        super().__post_init__(**values)
        register_model(self.base_model_type)


@cache
def config_class(model_type: str) -> type[PretrainedConfig]:
    """The exported config class of a stock model type.

    Raises:
        ValueError: transformers has no such model type.
    """
    return exported_config(model_type, __name__, RegisteringConfig)


@cache
def register_model(model_type: str) -> type[Any]:
    """Register the exported model class of a stock model type with transformers' Auto classes, and return it."""
    import transformers

    from tpcompress.export.with_code import ModelWithCode

    stock, config = stock_class(model_type), config_class(model_type)
    model = exported_model(config, __name__, ModelWithCode)
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        if auto._model_mapping.get(stock.config_class, None) is stock:
            auto.register(config, model, exist_ok=True)
    return model


def exported_types() -> dict[str, str]:
    """Model types of exported folders, mapped to the stock model type."""
    return {PREFIX + name: name for family in list_families().values() for name in family.model_types}


def register_configs() -> None:
    """Register every family's exported config class with `AutoConfig`."""
    for exported, stock in exported_types().items():
        AutoConfig.register(exported, config_class(stock), exist_ok=True)


def __getattr__(name: str) -> Any:
    """Look up generated classes by name, for pickle and multiprocessing."""
    if name.startswith("TPCompress"):
        for stock in exported_types().values():
            config = config_class(stock)
            if name == config.__name__:
                return config
            if name == class_name(stock_class(stock)):
                return register_model(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
