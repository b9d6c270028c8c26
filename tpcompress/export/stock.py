"""Stock checkpoints: the weights of a model, adapters merged and without a plan, for every loader of transformers.

`write_stock` fills a folder; `export(..., stock=DIR)` writes one beside an export on purpose, `dense.py` one of a run
without a plan.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tpcompress.export.classes import stock_class
from tpcompress.export.folder import DENSE, MANIFEST, SCHEMA, check_free, file_records, write_json
from tpcompress.export.patch import write_merged
from tpcompress.insertion.attach import PRUNERS
from tpcompress.version import __version__

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
{base}---

# {name}

**Unpruned, on purpose.** These are the weights of the export `{export}`, adapters merged, as a stock
{kind}: every loader of transformers reads this folder, and the model sees all of its vision tokens.
The export prunes them ({plan}); this folder has neither its plan nor its pruners' weights.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```

It is also a base for tpcompress: `tpcompress export OUT --base {name} --plan divprune:1/9` prunes it without training.
"""


def write_stock(
    folder: Path, base: Any, merged: nn.Module, processor: Any, card: str, about: Mapping[str, Any],
    max_shard_size: int | str,
) -> None:  # fmt: skip
    """Fill a folder with weights, config, processor, card and manifest.

    Args:
        folder: an empty folder.
        base: model of a stock class, or of an export, whose plan is left out.
        merged: the same model with its adapters merged (`adapters.merged_view`), or `base` itself.
        processor: processor of the model.
        card: text of README.md.
        about: entries of the manifest.
        max_shard_size: largest weight file.

    Raises:
        ValueError: weights that do not fit the stock class.
    """
    config = stock_config(base.config)
    with torch.device("meta"):
        made = stock_class(config.model_type)(config)
    with_weights(made, merged, without=f"{PRUNERS}.")
    made.save_pretrained(folder, max_shard_size=max_shard_size)
    write_merged(made, merged, folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    versions = {"tpcompress": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__)}
    manifest = {"format": DENSE, "schema": SCHEMA, "versions": versions, **about}
    write_json(folder / MANIFEST, manifest | {"files": file_records(folder)})


def stock_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the stock model, also of an exported one."""
    stock = getattr(config, "base_model_type", None)
    if stock is None:
        return config
    ours = ("model_type", "architectures", "token_pruning", "auto_map")
    kept = {k: v for k, v in config.to_dict().items() if k not in ours}
    return transformers.CONFIG_MAPPING[stock].from_dict(kept)


def stock_card(manifest: Mapping[str, Any], name: str, export: str) -> str:
    """Card of a stock checkpoint beside an export.

    Args:
        manifest: of the export.
        name: name of the stock folder.
        export: name of the export.
    """
    base = manifest["base"]["model"]
    plan = ", then ".join(f"{stage['pruner']} to {stage['retained']}" for stage in manifest["stages"])
    line = f"base_model: {base}\n" if base and "/" in base else ""
    text = f"{plan} of {manifest['vision_tokens']} per {manifest['scope']}"
    return CARD.format(name=name, export=export, kind=manifest["base"]["class"], plan=text, base=line)


def check_apart(out: Path, stock: Path, overwrite: bool) -> None:
    """Check that the stock checkpoint has a free folder of its own.

    Raises:
        ValueError: it is the folder of the export, or one of the two would lie in the other.
        FileExistsError: it exists and `overwrite` is off, or it is not an earlier export.
    """
    here, there = out.resolve(), stock.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"stock={stock} and the export {out} need folders of their own; put them side by side.")
    check_free(stock, overwrite)


def weights_of(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """sha256 of the weight files among the file records of a manifest."""
    return {name: record["sha256"] for name, record in files.items() if name.endswith(".safetensors")}


def with_weights(made: PreTrainedModel, base: Any, without: str | None = None) -> PreTrainedModel:
    """A model without weights that gets those of another, shared, and its generation config.

    Args:
        made: on the meta device.
        base: the other model.
        without: start of the names of weights to leave out.

    Raises:
        ValueError: they do not fit, or differ where the class shares one.
    """
    weights = {k: v for k, v in base.state_dict().items() if without is None or not k.startswith(without)}
    odd = sorted(set(weights) ^ set(made.state_dict()))
    if odd:
        adapted = any(part in name for name in odd for part in (".base_layer.", ".lora_", ".modules_to_save."))
        stock = getattr(base.config, "base_model_type", None) or base.config.model_type
        hint = "pass the PEFT model around it" if adapted else f"export a plain {stock_class(stock).__name__}"
        raise ValueError(f"The model has {len(odd)} weights more or less than its class, '{odd[0]}' first; {hint}.")
    made.load_state_dict(weights, assign=True)
    made.tie_weights()
    _check_tied(weights, made.state_dict())
    made.generation_config = copy.deepcopy(base.generation_config)
    return made


def _check_tied(weights: Mapping[str, Tensor], tied: Mapping[str, Tensor]) -> None:
    """Check that no weight is lost where the config lets two modules share one.

    Raises:
        ValueError: the model has different weights there.
    """
    for name, value in weights.items():
        if tied[name].data_ptr() != value.data_ptr() and not torch.equal(tied[name], value):
            raise ValueError(
                f"The config shares '{name}' with another weight (tie_word_embeddings), but the model has different "
                f"ones, so one would be lost; train both alike (lora.ensure_weight_tying), or untie the config."
            )
