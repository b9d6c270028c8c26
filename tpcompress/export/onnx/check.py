"""Checks a graph with ONNX Runtime against the module that it was made of, on the image at hand and on random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
"""Largest difference of features, as a share of the largest one or of 1."""
RANDOM = 3
"""Random images that are checked besides the one at hand."""


@dataclass(frozen=True)
class Checked:
    """What the check saw.

    Attributes:
        images: number of images.
        gap: largest difference of features.
        largest: largest feature.
        indices: whether the retained indices were equal on every image.
    """

    images: int
    gap: float
    largest: float
    indices: bool

    @property
    def ok(self) -> bool:
        """Whether the graph computes what the module does."""
        return self.indices and self.gap <= TOLERANCE * max(1.0, self.largest)

    def reason(self) -> str:
        """What differs, in a few words."""
        if not self.indices:
            return "ONNX Runtime retains other tokens than torch"
        return f"features of ONNX Runtime differ by {self.gap:.2g} (largest feature: {self.largest:.2g})"


def run_graph(path: Path, pixel_values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Features and indices of some images, by ONNX Runtime on the CPU.

    Raises:
        RuntimeError: ONNX Runtime cannot load or run the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        runs = [session.run(None, {"pixel_values": pixels.numpy()}) for pixels in pixel_values]
    except Exception as error:  # its errors share no base class
        raise RuntimeError(f"ONNX Runtime cannot run the graph: {str(error).strip().splitlines()[0]}") from error
    return [(torch.from_numpy(features), torch.from_numpy(indices)) for features, indices in runs]


def check_graph(path: Path, graph: nn.Module, pixel_values: Tensor) -> Checked:
    """Compare a written graph with its module.

    Args:
        path: the .onnx file.
        graph: the module.
        pixel_values: of the image at hand.
    """
    images = [pixel_values, *(_random(pixel_values, seed) for seed in range(RANDOM))]
    gap, largest, same = 0.0, 0.0, True
    for image, (features, indices) in zip(images, run_graph(path, images), strict=True):
        with torch.no_grad():
            wanted, kept = graph(image)
        same = same and torch.equal(indices, kept) and features.shape == wanted.shape
        largest = max(largest, wanted.abs().max().item())
        gap = max(gap, (features - wanted).abs().max().item() if features.shape == wanted.shape else float("inf"))
    return Checked(len(images), gap, largest, same)


def _random(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
