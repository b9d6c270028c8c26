"""Merges PEFT adapters into a copy of their model, and refuses those whose merging would lose what they learned."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tpcompress.errors import first_line


def merged_copy(model: nn.Module) -> PreTrainedModel:
    """Base of a PEFT model with its adapters merged; tensors that merging leaves unchanged are shared with the model.

    Raises:
        ValueError: adapters that cannot be merged, e.g. of prompt tuning, or on one of several modules that share a
            weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    tuner: Any = getattr(model, "base_model", None)
    if not hasattr(tuner, "merge_and_unload"):
        raise ValueError(
            f"Adapters of {type(model).__name__} cannot be merged into weights; train with LoRA to export."
        )
    check_ties(model)
    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    changed = {id(t) for module in adapted for t in (*module.parameters(), *module.buffers())}
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in changed}
    clone: Any = copy.deepcopy(model, shared)
    try:
        return clone.merge_and_unload()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        kind = model.peft_config[model.active_adapter].peft_type.value  # type: ignore[union-attr,index]
        raise ValueError(
            f"{kind} adapters cannot be merged ({first_line(error)}); train with LoRA to export."
        ) from error


def check_ties(model: nn.Module) -> None:
    """Check that adapters treat modules that share a weight alike, such as the embedding and a tied output head.

    Merging into one of them would change the other, or the shared weight would replace what was learned.

    Args:
        model: a PEFT model.

    Raises:
        ValueError: one of several modules that share a weight is adapted, and its tuner does not keep them tied.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    configs: Any = getattr(model, "peft_config", {})
    if any(getattr(config, "ensure_weight_tying", False) for config in configs.values()):
        return
    users = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner: Any = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            inner = module.original_module
        else:
            continue
        if any(users[id(parameter)] > 1 for parameter in inner.parameters()):
            raise ValueError(
                f"lora: {name.rpartition('.')[2]} shares its weight with another module of this base "
                f"(tie_word_embeddings), so adapters on it alone cannot be exported; add ensure_weight_tying: true, or "
                f"leave it out of target_modules and modules_to_save."
            )
