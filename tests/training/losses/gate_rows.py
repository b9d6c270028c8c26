"""The rows of the passes made by hand: their gates and what is retained of each."""

from training.losses.gate_passes import (
    TOKENS,
)

COUNTS = [3, 3, 2]
"""What `Budget(keep_ratio=0.5)` gives the rows."""


def rows(here):
    """Gates and scores of each row without padding."""
    chosen = here.trace.stages[0].selection
    return [(chosen.gate_BV[r, :n].detach(), chosen.scores_BV[r, :n].detach()) for r, n in enumerate(TOKENS)]
