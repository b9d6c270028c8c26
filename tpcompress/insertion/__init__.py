"""Inserts pruning into unmodified transformers models: plans, hooks, views, and the cut of the sequence."""
