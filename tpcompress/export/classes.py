"""The config and model classes of exported folders, derived from the stock ones of a model type.

An export carries a copy of this file for loading without tpcompress; `registry.py` makes them for the package.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from tpcompress.export.weights import weights_to_read

PREFIX = "tpcompress_"
"""Start of the model types of exported folders."""
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForPreTraining")


class ExportedConfig:
    """Mixin of exported config classes: the plan under the key `token_pruning`."""

    base_model_type: ClassVar[str]
    token_pruning: dict[str, Any]

    def __post_init__(self, **values: Any) -> None:
        super().__post_init__(**values)  # type: ignore[misc]
        if weights_to_read() is not None:
            self.transformers_weights = weights_to_read()  # transformers' own key; it never saves it


def exported_config(model_type: str, module: str, mixin: type[ExportedConfig] = ExportedConfig) -> type[Any]:
    """The exported config class of a stock model type, e.g. `TPCompressLlavaConfig` of "llava".

    Args:
        model_type: stock model type.
        module: dotted name of the module that holds the class.
        mixin: precedes the stock class in the bases.

    Raises:
        ValueError: transformers has no such model type.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers has no model type '{model_type}'; update transformers.")
    stock = CONFIG_MAPPING[model_type]
    return derived(stock, mixin, module, {"model_type": PREFIX + model_type, "base_model_type": model_type})


def exported_model(config: type[Any], module: str, mixin: type[Any] | None = None) -> type[Any]:
    """The exported model class of an exported config class.

    transformers renames checkpoint keys by rules that are looked up by class name or model type. The exported names get
    the stock rules, so that weights are read and written under their stock keys.

    Args:
        config: exported config class.
        module: dotted name of the module that holds the class.
        mixin: precedes the stock class in the bases; default: `ExportedModel`.
    """
    from tpcompress.export.model import FP32, ExportedModel

    model_type = config.base_model_type
    stock = stock_class(model_type)
    fields: dict[str, Any] = {"config_class": config}
    # Strict: in bfloat16 too. Quantisers read the other list for what they leave alone.
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        fields[name] = sorted({*(getattr(stock, name) or ()), FP32})
    made = derived(stock, mixin or ExportedModel, module, fields)
    for known, ours in ((stock.__name__, made.__name__), (model_type, PREFIX + model_type)):
        rules = get_checkpoint_conversion_mapping(known)
        if rules is not None:
            register_checkpoint_conversion_mapping(ours, rules, overwrite=True)
    return made


def stock_class(model_type: str) -> type[Any]:
    """The transformers class of a model type."""
    found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[model_type]]
    return found


def class_name(stock: type[PretrainedConfig] | type[Any]) -> str:
    """Name of the exported class of a stock class."""
    return f"TPCompress{stock.__name__}"


def derived(stock: type[Any], mixin: type[Any], module: str, fields: dict[str, Any]) -> type[Any]:
    """A class that derives from a stock class, with the mixin before it."""
    name = class_name(stock)
    doc = f"{stock.__name__} of a folder written by tpcompress."
    return type(name, (mixin, stock), {"__module__": module, "__qualname__": name, "__doc__": doc, **fields})
