"""Estimators: which ways to pass a gradient through a choice of tokens train a scorer, on a toy task and on a base."""
