"""Controlled experiments on top of the evaluation engine: studies of training, and a table of gradient estimators."""
