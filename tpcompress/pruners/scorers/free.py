"""Free: the scores of a training-free pruner, under any selector and applier.

B rows, V vision tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from tpcompress.pruners.base import Pruner, TokenView
from tpcompress.pruners.gate_components import Scorer, Scores
from tpcompress.pruners.registry import create


class Free(Scorer):
    """score_v = that of a pruner without weights, run at full budget so that it ranks every token.

    Under the plain top-k it retains what the pruner itself retains, if that is the top of its scores. Rules whose
    choice is more than their scores (`dart`, `window`) are read for their scores alone, and where these are all the
    same (`uniform`) the first tokens win. No gradient reaches them.

    needs  what the pruner needs.     Source: ours; as `Composed`, its other user.     Cost: the pruner's.

    Args:
        pruner: a pruner, its name, or a mapping with its `type`.

    Raises:
        ValueError: the pruner has weights, merges tokens, chooses its own count or retains nothing; or it is a dotted
            path.
    """

    name = "free"
    test_arguments = (
        {"pruner": {"type": "fastv"}},
        {"pruner": {"type": "divprune"}},
        {"pruner": {"type": "cdpruner"}},
        {"pruner": {"type": "hiprune"}},
    )

    def __init__(self, pruner: Pruner | str | dict[str, Any] = "novelty") -> None:
        super().__init__()
        if isinstance(pruner, str) and "." in pruner:
            # It may come from an untrusted checkpoint; `create_part` has built all mappings that are allowed.
            raise ValueError(
                f"free does not import '{pruner}' from outside tpcompress; write {{type: {pruner}}} instead."
            )
        self.pruner = create(pruner, allow_outside=False)
        reasons = {
            "has weights of its own": self.pruner.learned,
            "merges tokens": self.pruner.merges,
            "chooses its own count": not self.pruner.exact_count,
            "retains nothing": self.pruner.keeps_none,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(
                    f"free cannot take scores of '{self.pruner.name}', which {reason}; name another pruner."
                )

    @property
    def needs(self) -> frozenset[str]:
        return self.pruner.needs

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return self.pruner.tower_layers

    @property
    def prompt_dependent(self) -> bool:
        return self.pruner.prompt_dependent

    def config(self) -> dict[str, Any]:
        return super().config() | {"pruner": self.pruner.config()}

    def build(self, hidden_size: int) -> None:
        self.pruner.build(hidden_size)

    def set_progress(self, progress: float) -> None:
        self.pruner.set_progress(progress)

    @torch.no_grad()
    def forward(self, tokens: TokenView) -> Scores:
        """Score every token; the count of valid ones is on the device, so the budget is V: padding ranks last."""
        B, V = tokens.valid_BV.shape
        return Scores(self.pruner(tokens, torch.tensor([V] * B)).scores_BV.float())
