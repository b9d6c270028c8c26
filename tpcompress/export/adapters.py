"""Merges PEFT adapters of a model layer by layer, and refuses those whose merging would lose what they learned.

`merged_view` copies no weight: an adapted layer computes its merged weights whenever it is called, and `merged_weights`
yields them one layer after the other for writing. A whole merged copy would double the memory of an export.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tpcompress.errors import first_line
from tpcompress.export.memory import return_freed

LARGE = 1 << 20
"""Bytes of a layer whose merged copy is worth returning to the system."""


class MergedLayer(nn.Module):
    """A layer with adapters as the plain layer that it becomes: its parameters have the names of the base layer.

    The stored parameters are those of the base layer, shared and unmerged. `forward`, and reading a weight as an
    attribute, merge a copy of this one layer.

    Args:
        adapted: layer of PEFT; it is never changed.
    """

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__()
        base = _base_of(adapted)
        self.__dict__["adapted"] = adapted  # not a submodule: the state dict is that of the base layer
        self.__dict__["base"] = base
        self.__dict__["stored"] = {name: p.dtype for name, p in base.named_parameters()}
        self._parameters.update(base._parameters)
        self._buffers.update(base._buffers)
        self._non_persistent_buffers_set.update(base._non_persistent_buffers_set)
        self._modules.update(base._modules)
        self.train(adapted.training)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """A copy of the base layer with the adapters merged in, in the dtype that the parameters have now."""
        if sum(p.nbytes for p in self._parameters.values() if p is not None) > LARGE:
            return_freed()  # of the layer before
        now = {name: p.dtype for name, p in self.__dict__["base"].named_parameters()}
        adapted: Any = copy.deepcopy(self.__dict__["adapted"])
        if now != self.__dict__["stored"]:  # half-precision weights that are float32 for a while merge as they were
            _cast(_base_of(adapted), self.__dict__["stored"])
        made = _unloaded(adapted)
        if now != self.__dict__["stored"]:
            _cast(made, now)
        return made.train(self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.merged()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_parameters", ()):
            return getattr(self.merged(), name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__ or name.startswith("__"):  # while it is copied
                raise
            return getattr(self.__dict__["base"], name)


def merged_view(model: nn.Module) -> PreTrainedModel:
    """Base of a PEFT model with its adapters merged on call. Every tensor is shared with the model.

    Raises:
        ValueError: adapters that cannot be merged, e.g. of prompt tuning, or on one of several modules that share a
            weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    tuner: Any = getattr(model, "base_model", None)
    if not hasattr(tuner, "merge_and_unload"):
        raise ValueError(
            f"Adapters of {type(model).__name__} cannot be merged into weights; train with LoRA to export."
        )
    check_ties(model)
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    clone: Any = copy.deepcopy(model, shared)
    base: Any = clone.get_base_model()
    try:
        clone.base_model._check_merge_allowed()
        for name, module in _outermost(base, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            if isinstance(module, ModulesToSaveWrapper) and not _holds(module, BaseTunerLayer):
                plain: nn.Module = _unloaded(module)  # the trained module itself, which nothing is merged into
            else:
                plain = MergedLayer(module)
                plain.merged()
            base.set_submodule(name, plain)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        kind = model.peft_config[model.active_adapter].peft_type.value  # type: ignore[union-attr,index]
        raise ValueError(
            f"{kind} adapters cannot be merged ({first_line(error)}); train with LoRA to export."
        ) from error
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


def merged_weights(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights that merging changes, by their name in the state dict of a `merged_view`, one layer after the other."""
    for prefix, module in base.named_modules():
        if isinstance(module, MergedLayer):
            before, after = module.state_dict(), module.merged().state_dict()
            for name, value in after.items():
                if value is not before.get(name):
                    yield f"{prefix}.{name}", value
            del after


def is_merged(base: nn.Module) -> bool:
    """Whether a model is a `merged_view` with layers to merge."""
    return any(isinstance(module, MergedLayer) for module in base.modules())


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


def _outermost(base: nn.Module, kinds: tuple[type, ...]) -> list[tuple[str, Any]]:
    """Modules of these kinds that no other such module holds."""
    found: list[tuple[str, Any]] = []
    for name, module in base.named_modules(remove_duplicate=False):
        if isinstance(module, kinds) and not any(name.startswith(f"{outer}.") for outer, _ in found):
            found.append((name, module))
    return found


def _holds(module: nn.Module, kind: type) -> bool:
    return any(isinstance(inner, kind) for inner in module.modules())


def _base_of(adapted: Any) -> nn.Module:
    found: nn.Module = adapted.get_base_layer() if hasattr(adapted, "get_base_layer") else adapted.original_module
    return found


def _unloaded(adapted: Any) -> nn.Module:
    """The plain layer that a layer of PEFT becomes, with adapters merged; the layer itself changes."""
    if hasattr(adapted, "unload_and_optionally_merge_module"):  # layers with a way of their own
        made: nn.Module = adapted.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        return made
    adapted.merge(safe_merge=False, adapter_names=None)
    return _base_of(adapted)


def _cast(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, parameter in module.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])
