"""Handwritten digits for the benchmark (UCI, CC BY 4.0; see `assets/DIGITS_LICENSE.txt`) with a fixed split."""

from functools import cache
from importlib.resources import files

import numpy as np

SPLITS = ("train", "validation", "test")
_MAX_INK = 16


@cache
def digit_samples(split: str, digit: str) -> np.ndarray:
    """All samples of a digit in a split.

    Returns:
        float (N, 8, 8): ink in [0, 1], read-only.
    """
    with files("tpcompress").joinpath("assets/digits.npz").open("rb") as stream, np.load(stream) as packed:
        chosen = (packed["labels"] == int(digit)) & (packed["split"] == SPLITS.index(split))
        samples = packed["images"][chosen].astype(np.float32) / _MAX_INK
    samples.setflags(write=False)
    return samples


def digit_sample(split: str, digit: str, pick: float) -> np.ndarray:
    """The sample (8, 8) of a digit selected by `pick` in [0, 1)."""
    samples = digit_samples(split, digit)
    return samples[int(pick * len(samples))]
