"""Writes a model that was trained without a plan, the dense control, as a stock transformers checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from tpcompress.export.adapters import merged_view
from tpcompress.export.bake import check_writable, recipe_text
from tpcompress.export.folder import check_free, new_folder
from tpcompress.export.stock import write_stock
from tpcompress.export.trained_probe import check_reload
from tpcompress.export.weights import MAX_SHARD_SIZE
from tpcompress.insertion.attach import base_of, is_attached

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# {name}

A dense {kind}: fine-tuned without vision-token pruning, as the control of models that were trained with it.
Any loader of transformers reads this folder; adapters are merged.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```

It is also a base for tpcompress: `tpcompress export OUT --base {name} --plan divprune:1/9` prunes it without training.

## Training

```yaml
{facts}```
"""


def export_dense(
    model: nn.Module,
    processor: Any,
    out: str | Path,
    *,
    recipe: str | Path | Mapping[str, Any] | None = None,
    trained_with: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    trained_probe: Mapping[str, Any] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a model without a plan to a folder that every loader of transformers reads.

    Args:
        model: a transformers model, or a PEFT model around one, whose adapters are merged into what is written.
        processor: processor of the model; saved in the same folder.
        out: folder to write; it appears only when complete.
        recipe: YAML file or mapping that the model was trained with, saved as recipe.yaml.
        trained_with: facts about the training, for the manifest and the model card.
        overwrite: replace an earlier export at `out`.
        trained_probe: see `tpcompress.export.export`.
        max_shard_size: largest weight file, in bytes or as text such as 5GB.

    Returns:
        The folder.

    Raises:
        ValueError: a model with a plan, weights or adapters that cannot be written, or a model that is not the one
            that was trained.
        FileExistsError: `out` exists.
    """
    out = Path(out).expanduser()
    check_free(out, overwrite)
    if is_attached(model):
        raise ValueError("The model has a plan; write it with tpcompress.export, or detach the plan first.")
    base: Any = base_of(model)
    check_writable(base, processor)
    merged: Any = base if model is base else merged_view(model)
    reload = None if trained_probe is None else check_reload(trained_probe, merged, "The exported model")
    facts = dict(trained_with or {})
    shown = yaml.safe_dump(facts, sort_keys=False)
    card = CARD.format(name=out.name, kind=type(base).__name__, facts=shown)
    text = recipe_text(recipe)
    with new_folder(out, overwrite) as folder:
        if text is not None:
            (folder / "recipe.yaml").write_text(text, encoding="utf-8")
        about = {"reload": reload, "trained_with": facts}
        write_stock(folder, base, merged, processor, card, about, max_shard_size)
    return out
