"""Studies: the same pruners at the same budgets without training, after dense training, and trained in the loop."""
