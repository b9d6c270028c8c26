"""transformers classes of exported folders: one config and one model class per family, derived from the stock ones.

A folder's `model_type` is `tpcompress_<stock model type>`, so that it cannot be loaded without the plan. Config classes
are registered when `AutoConfig` first looks for one of them, without importing modeling code. The model class is
registered when the first config of its family is created, which happens before `AutoModelForImageTextToText` looks for
it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from tpcompress.auto_register import PREFIX as PREFIX
from tpcompress.export.weights import weights_to_read
from tpcompress.families import list_families

AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForPreTraining")


class ExportedConfig:
    """Mixin of exported config classes: the plan under the key `token_pruning`."""

    base_model_type: ClassVar[str]
    token_pruning: dict[str, Any]

    def __post_init__(self, **values: Any) -> None:
        super().__post_init__(**values)  # type: ignore[misc]
        if weights_to_read() is not None:
            self.transformers_weights = weights_to_read()  # transformers' own key; it never saves it
        register_model(self.base_model_type)


@cache
def config_class(model_type: str) -> type[PretrainedConfig]:
    """The exported config class of a stock model type, e.g. `TPCompressLlavaConfig` of "llava".

    Raises:
        ValueError: transformers has no such model type.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers has no model type '{model_type}'; correct model_types in the family file.")
    stock = CONFIG_MAPPING[model_type]
    fields = {"model_type": PREFIX + model_type, "base_model_type": model_type}
    return _class(f"TPCompress{stock.__name__}", (ExportedConfig, stock), fields)


@cache
def register_model(model_type: str) -> type[Any]:
    """Register the exported model class of a stock model type with transformers' Auto classes, and return it.

    transformers renames checkpoint keys by rules that are looked up by class name or model type. The exported names get
    the stock rules, so that weights are read and written under their stock keys.
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
    """The transformers class of a model type."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[model_type]]
    return found


def exported_types() -> dict[str, str]:
    """Model types of exported folders, mapped to the stock model type."""
    return {PREFIX + name: name for family in list_families().values() for name in family.model_types}


def register_configs() -> None:
    """Register every family's exported config class with `AutoConfig`."""
    for exported, stock in exported_types().items():
        AutoConfig.register(exported, config_class(stock), exist_ok=True)


def _class(name: str, bases: tuple[type[Any], ...], fields: dict[str, Any]) -> type[Any]:
    doc = f"{bases[1].__name__} of a folder written by tpcompress."
    return type(name, bases, {"__module__": __name__, "__qualname__": name, "__doc__": doc, **fields})


def __getattr__(name: str) -> Any:
    """Look up generated classes by name, for pickle and multiprocessing."""
    if name.startswith("TPCompress"):
        for stock in exported_types().values():
            config = config_class(stock)
            if name == config.__name__:
                return config
            if name.endswith(stock_class(stock).__name__):
                return register_model(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
