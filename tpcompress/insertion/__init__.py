"""HOW the choice reaches the model: plan, hooks, the cut, and the record of it."""
