"""What is known of encoded images and videos, kept by the identity of their feature tensors.

`generate` encodes images before the prefill and drops their sizes. The containers of features do not last on that way:
accelerate and FSDP rebuild them. The tensors last, unless they are copied to another device or dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from tpcompress.families import Layout

TowerValues = dict[tuple[str, int], list[Tensor]]
"""(view, tower layer as the pruner counts it, or 0) -> values of the placeholders of each feature."""


@dataclass
class Encoded:
    """What is known of one call of an encoder.

    Attributes:
        layouts: one per feature of its `pooler_output`.
        tower: views of the vision tower, feature by feature.
    """

    layouts: list[Layout]
    tower: TowerValues = field(default_factory=dict)

    def reordered(self, index: Sequence[int]) -> Encoded:
        """The features at `index`, in this order; an index may occur several times (beams)."""
        tower = {key: [values[i] for i in index] for key, values in self.tower.items()}
        return Encoded([self.layouts[i] for i in index], tower)


@dataclass(frozen=True, eq=False)
class _Group:
    """The features of one encoder call: what is known of them, and their tensors, for as long as these live."""

    encoded: Encoded
    features: tuple[TensorWeakRef, ...]
    stacked: bool


_groups: Any = WeakTensorKeyDictionary()  # feature tensor -> (its group, its number in it)
_lock = threading.Lock()


def remember_features(features: Tensor | Sequence[Tensor], encoded: Encoded) -> None:
    """Keep what is known of features for as long as their tensors live."""
    tensors = _tensors(features)
    group = _Group(encoded, tuple(map(TensorWeakRef, tensors)), isinstance(features, Tensor))
    with _lock:
        for number, tensor in enumerate(tensors):
            _groups[tensor] = (group, number)


def recall_features(features: Tensor | Sequence[Tensor]) -> Encoded | None:
    """What is known of features: by the identity of their tensors, else by the values of tensors that still live.

    The second way serves copies on another device or in another dtype. It costs one host-device sync.
    """
    tensors = _tensors(features)
    if not tensors:
        return Encoded([])
    found = [_groups.get(tensor) for tensor in tensors]
    if None in found:
        return _equal_features(tensors, isinstance(features, Tensor))
    group = found[0][0]
    if group.stacked:
        return group.encoded
    parts = [group.encoded.reordered([number]) for group, number in found]
    if any(part.tower.keys() != parts[0].tower.keys() for part in parts):
        return None
    tower = {key: [value for part in parts for value in part.tower[key]] for key in parts[0].tower}
    return Encoded([layout for part in parts for layout in part.layouts], tower)


def _equal_features(tensors: list[Tensor], stacked: bool) -> Encoded | None:
    with _lock:
        groups = {id(group): group for group, _ in _groups.values()}
    for group in reversed(list(groups.values())):
        originals = [reference() for reference in group.features]
        if group.stacked == stacked and len(originals) == len(tensors) and all(map(_equal, originals, tensors)):
            return group.encoded
    return None


def _equal(original: Tensor | None, copied: Tensor) -> bool:
    return original is not None and original.shape == copied.shape and torch.equal(original.to(copied), copied)


def _tensors(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def given_features(inputs: Mapping[str, Any]) -> dict[str, Encoded]:
    """What is known of the features that a call was given in place of pixels, by modality.

    Raises:
        ValueError: nothing is known of them.
    """
    found = {}
    for modality, output in (inputs.get("mm_encoder_outputs") or {}).items():
        if output is None:
            continue
        encoded = recall_features(output.pooler_output)
        if encoded is None:
            raise ValueError(
                f"The layout of the {modality} features of this call is unknown: they were encoded before the plan was "
                f"attached, changed since, or cut by a chunked prefill. Call get_{modality}_features of the attached "
                f"model, and leave prefill_chunk_size out."
            )
        found[modality] = encoded
    return found


def has_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether a call brings images or videos, as pixels or as features."""
    if any(output is not None for output in (inputs.get("mm_encoder_outputs") or {}).values()):
        return True
    pixels = (value for name, value in inputs.items() if name.startswith("pixel_values"))
    return any(value is not None and len(value) > 0 for value in pixels)
