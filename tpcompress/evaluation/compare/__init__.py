"""Comparisons: dense, control, training-free and training-aware rows of one base model, as a table and figures."""
