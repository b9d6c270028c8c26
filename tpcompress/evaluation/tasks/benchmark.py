"""The built-in benchmark: procedural images with a question of every family."""

from __future__ import annotations

from tpcompress.data.benchmark import load_benchmark
from tpcompress.evaluation.scoring.batches import Rows
from tpcompress.evaluation.tasks.base import Task


class Benchmark(Task):
    """Images of one split of the built-in benchmark.

    Args:
        num_images: number of images.
        seed: stream of images within the split.
        split: `train`, `validation` or `test`; `train` is for calibration, never for results.

    Raises:
        ValueError: fewer than one image.
    """

    name = "benchmark"
    metric = "exact_match"

    def __init__(self, num_images: int = 320, seed: int = 0, split: str = "test") -> None:
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"num_images must be a whole number of at least 1, got {num_images!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}.")
        self.num_images, self.seed, self.split = num_images, seed, split

    def load(self) -> Rows:
        """Draw the images."""
        return load_benchmark(self.split, self.num_images, self.seed)

    @property
    def description(self) -> str:
        """`the built-in benchmark`."""
        return "the built-in benchmark"
