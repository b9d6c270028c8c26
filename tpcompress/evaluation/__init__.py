"""Evaluation: how well a pruned model answers, with what certainty, and at what cost."""
