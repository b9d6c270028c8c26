"""Train the model of the retrieval task and write tpcompress/assets/retrieval.npz (under a minute on one core).

python scripts/build_retrieval.py
"""

import sys

from tpcompress.lab.estimators.toy_task import WEIGHTS, hard_scores, load_model, save_weights, train_dense

NEEDED = 0.995


def main() -> int:
    """Train, save, load and evaluate the model; the exit code is 1 if its accuracy is too low."""
    save_weights(train_dense())
    right, _ = hard_scores(load_model(), None, batch=4096)
    print(f"{WEIGHTS}: {100 * right:.2f} % accuracy with all tokens, {WEIGHTS.stat().st_size / 1000:.0f} kB")
    return 0 if right >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
