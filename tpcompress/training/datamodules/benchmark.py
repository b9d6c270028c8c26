"""Lightning data module for the procedural benchmark."""

from __future__ import annotations

import datasets

from tpcompress.data.benchmark import draw_benchmark
from tpcompress.training.datamodules.base import RowsData


class BenchmarkData(RowsData):
    """The procedural benchmark: images with one question per question family.

    Args:
        num_train: number of training images.
        num_val: number of validation images, 0 for none.
        batch_size: images per batch and rank.
        seed: seed of the images and of their order.
        pack: pack all questions about an image into one sequence, which share its vision tokens.
        num_workers: worker processes that encode images.
        max_length: maximum sequence length in tokens.
    """

    validation_keys = "num_val"

    def __init__(
        self,
        num_train: int = 4800,
        num_val: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        pack: bool = True,
        num_workers: int = 0,
        max_length: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, "raise", max_length, pack, seed)
        self.num_train = num_train
        self.num_val = num_val

    def load_rows(self) -> tuple[datasets.Dataset | None, datasets.Dataset | None]:
        """Draw the images."""
        val = draw_benchmark("validation", self.num_val, self.seed) if self.num_val else None
        return draw_benchmark("train", self.num_train, self.seed), val
