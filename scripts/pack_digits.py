"""Convert the UCI handwritten digits of scikit-learn to `tpcompress/assets/digits.npz`.

    python scripts/pack_digits.py

Requires scikit-learn, which the package itself does not.
"""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

ASSET = Path(__file__).resolve().parents[1] / "tpcompress" / "assets" / "digits.npz"
# Samples are ordered by writer, so the last ones are mostly by writers that are not in the training split.
TRAIN, VALIDATION = 1400, 1598


def main() -> None:
    """Write images (N, 8, 8) with ink 0-16, labels (N,) and splits (N,): 0 train, 1 validation, 2 test."""
    digits = load_digits()
    split = np.full(len(digits.target), 2, np.uint8)
    split[:VALIDATION] = 1
    split[:TRAIN] = 0
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    np.savez_compressed(ASSET, images=images, labels=labels, split=split)


if __name__ == "__main__":
    main()
