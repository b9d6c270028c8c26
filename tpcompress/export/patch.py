"""Writes merged weights into the files that transformers wrote with the base weights, one tensor at a time.

A safetensors file is eight bytes (the length of its header), the header as JSON (dtype, shape and place of every
tensor), and the tensors. Names, shards and order are thus those of transformers, as of any later save.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tpcompress.export.adapters import is_merged, merged_weights

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of dtypes in the header of a safetensors file."""


def write_merged(made: PreTrainedModel, merged: nn.Module, folder: Path) -> None:
    """Replace the base weights in written files by merged ones.

    Args:
        made: the model that was written, with the base weights.
        merged: model of `adapters.merged_view`.
        folder: the files, `*.safetensors`.

    Raises:
        ValueError: a merged weight has no place of its dtype and shape in the files, or two modules that share a weight
            would have different ones.
    """
    if not is_merged(merged):
        return
    places, twins = _places(folder), _twins(made)
    for name, value in merged_weights(merged):
        twin = twins.get(name)
        if twin is not None:
            if not torch.equal(value, _weight(merged, twin)):
                raise ValueError(
                    f"The config shares '{name}' with another weight (tie_word_embeddings), but merging gives "
                    f"different ones, so one would be lost; train both alike (lora.ensure_weight_tying), or untie the "
                    f"config."
                )
            continue
        for written, tensor in revert_weight_conversion(made, {name: value.detach()}).items():
            if written not in places:
                raise ValueError(f"The merged weight '{name}' has no place in the files; please report this model.")
            _put(tensor, written, *places[written])


def _twins(made: PreTrainedModel) -> dict[str, str]:
    """Weights that are not written because another one shares their tensor, with the name of the written one."""
    found: dict[str, str] = {}
    tied: dict[str, str] = getattr(made, "all_tied_weights_keys", None) or {}
    names = made.state_dict().keys()
    for name, source in tied.items():
        if name in names and source in names and name != source:
            found[name] = source
    return found


def _weight(merged: nn.Module, name: str) -> Tensor:
    holder, _, last = name.rpartition(".")
    value: Tensor = getattr(merged.get_submodule(holder), last)
    return value


def _places(folder: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """File, start of the data, and header entry of every tensor."""
    return {name: (path, start, entry) for path in sorted(folder.glob("*.safetensors"))
            for start, name, entry in _entries(path)}  # fmt: skip


def _entries(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            yield 8 + length, name, entry


def _put(tensor: Tensor, name: str, path: Path, start: int, entry: dict[str, Any]) -> None:
    dtype, (begin, end) = TYPES.get(entry["dtype"]), entry["data_offsets"]
    if tensor.dtype != dtype or list(tensor.shape) != entry["shape"]:
        raise ValueError(
            f"Merging turned '{name}' into {tensor.dtype} {tuple(tensor.shape)}, but the base has {entry['dtype']} "
            f"{tuple(entry['shape'])}; use adapters that keep the shape of their layer."
        )
    values = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    assert values.nbytes == end - begin
    with path.open("r+b") as file:
        file.seek(start + begin)
        file.write(values.data)
