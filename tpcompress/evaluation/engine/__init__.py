"""The engine of comparisons, studies and estimator tables: named results with keys, made once and kept on disk."""
