"""Remember what a vision tower makes of a picture, while many rules are tested on the same pictures.

N images, P patches with the class token, C channels.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tpcompress.families import resolve
from tpcompress.insertion.attach import base_of, is_attached, plan_of
from tpcompress.pruners.views import TOWER_FIELDS

PICTURES = 2048
"""Pictures that are remembered of one tower: 0.4 MB each."""

_memories: WeakKeyDictionary[nn.Module, OrderedDict[str, Tensor]] = WeakKeyDictionary()


@contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """Within the block, the tower of a LLaVA runs once per picture.

    It runs every time where its layers are read by a pruner, where it is trained, or where other layers than the last
    are features: what is remembered is the last layer's output alone.
    """
    base = base_of(model)
    tower: Any = resolve(base).vision_tower if _is_plain(base) else None
    if tower is None or _reads_tower(model) or tower.training or "forward" in vars(tower):
        yield
        return
    forward, memory = tower.forward, _memories.setdefault(tower, OrderedDict())

    def recall(pixel_values: Tensor, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(pixel_values, **kwargs)
        names = [_name(image) for image in pixel_values]
        new = [i for i, name in enumerate(names) if name not in memory]
        if new:
            output = forward(pixel_values[new], **(kwargs | {"output_hidden_states": True, "return_dict": True}))
            for i, x_PC in zip(new, output.hidden_states[-1], strict=True):
                memory[names[i]] = x_PC.clone()
        last_NPC = torch.stack([memory[name] for name in names])
        for name in names:
            memory.move_to_end(name)
        while len(memory) > PICTURES:
            memory.popitem(last=False)
        return BaseModelOutputWithPooling(last_hidden_state=last_NPC, hidden_states=(last_NPC,))

    tower.forward = recall
    try:
        yield
    finally:
        del tower.forward


def _is_plain(base: Any) -> bool:
    """A LLaVA whose features are the last layer's output."""
    return base.config.model_type == "llava" and base.config.vision_feature_layer == -1


def _reads_tower(model: nn.Module) -> bool:
    """Whether a pruner of the attached plan reads layers of the tower."""
    if not is_attached(model):
        return False
    return any(not TOWER_FIELDS.keys().isdisjoint(stage.pruner.needs) for stage in plan_of(model).stages)


def _name(image: Tensor) -> str:
    pixels = image.detach().contiguous().cpu()
    if pixels.dtype == torch.bfloat16:
        pixels = pixels.float()
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
