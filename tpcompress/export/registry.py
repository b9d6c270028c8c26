"""The transformers classes of exported folders: one config and one model class per family, made from the stock ones.

A folder's `model_type` is `tpcompress_<stock model type>`, so whoever does not know the plan cannot load it. Config
classes are registered when tpcompress is imported and cost no modelling code. The model class follows when the first
config of its family is made, which is always before `AutoModelForImageTextToText` looks for it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from tpcompress.families import list_families

PREFIX = "tpcompress_"
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForPreTraining")


class ExportedConfig:
    """What an exported config adds to the stock one: the plan, under the key `token_pruning`."""

    base_model_type: ClassVar[str]
    token_pruning: dict[str, Any]

    def __post_init__(self, **values: Any) -> None:
        super().__post_init__(**values)  # type: ignore[misc]
        register_model(self.base_model_type)


@cache
def config_class(model_type: str) -> type[PretrainedConfig]:
    """The exported config class of a stock model type, e.g. `TPCompressLlavaConfig` of "llava".

    Raises:
        ValueError: transformers has no such model type.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model type '{model_type}'; name one of its own in the family file.")
    stock = CONFIG_MAPPING[model_type]
    fields = {"model_type": PREFIX + model_type, "base_model_type": model_type}
    return _class(f"TPCompress{stock.__name__}", (ExportedConfig, stock), fields)


@cache
def register_model(model_type: str) -> type[Any]:
    """Make the exported model class of a stock model type known to transformers' Auto classes, and return it.

    The rules by which transformers renames checkpoint keys hold for a class or model type by name. The exported names
    get the stock rules, so that weights are read and written under the keys that every other tool expects.
    """
    import transformers
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    from tpcompress.export.model import FP32, ExportedModel

    stock, config = stock_class(model_type), config_class(model_type)
    fp32 = sorted({*(stock._keep_in_fp32_modules_strict or ()), FP32})
    fields = {"config_class": config, "_keep_in_fp32_modules_strict": fp32}
    model = _class(f"TPCompress{stock.__name__}", (ExportedModel, stock), fields)
    for known, ours in ((stock.__name__, model.__name__), (model_type, PREFIX + model_type)):
        rules = get_checkpoint_conversion_mapping(known)
        if rules is not None:
            register_checkpoint_conversion_mapping(ours, rules, overwrite=True)
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        if auto._model_mapping.get(stock.config_class, None) is stock:
            auto.register(config, model, exist_ok=True)
    return model


def stock_class(model_type: str) -> type[Any]:
    """The class that transformers loads a model type with."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[model_type]]
    return found


def exported_types() -> dict[str, str]:
    """The model type of exported folders -> the stock model type, for every family."""
    return {PREFIX + name: name for family in list_families().values() for name in family.model_types}


def register_configs() -> None:
    """Make every family's exported model type known to `AutoConfig`."""
    for exported, stock in exported_types().items():
        AutoConfig.register(exported, config_class(stock), exist_ok=True)


def _class(name: str, bases: tuple[type[Any], ...], fields: dict[str, Any]) -> type[Any]:
    doc = f"{bases[1].__name__} of a folder written by tpcompress."
    return type(name, bases, {"__module__": __name__, "__qualname__": name, "__doc__": doc, **fields})


def __getattr__(name: str) -> Any:
    """The made classes by name: pickle and multiprocessing look for them here."""
    if name.startswith("TPCompress"):
        for stock in exported_types().values():
            config = config_class(stock)
            if name == config.__name__:
                return config
            if name.endswith(stock_class(stock).__name__):
                return register_model(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
