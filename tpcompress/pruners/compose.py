"""What pruners made of other pruners share: the parts by name, and all that they need together.

B rows, V tokens, L layers of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.registry import create

TOWER_FIELDS = (
    "tower_cls_BLHV",
    "tower_cls_query_BLHVD",
    "tower_received_BLHV",
    "tower_keys_BLHVD",
    "tower_features_BLVD",
)


class Composed(Pruner):
    """A pruner whose parts are pruners; subclasses list their arguments that name one in `part_names`."""

    part_names: tuple[str, ...] = ("pruner",)

    def __init__(self, **parts: Pruner | str | dict[str, Any]) -> None:
        super().__init__()
        for argument, given in parts.items():
            part = create(given)
            if part.withdraws:
                raise ValueError(
                    f"{self.name} cannot build on '{part.name}', which retains nothing; name another pruner."
                )
            self.add_module(argument, part)

    @property
    def parts(self) -> list[Pruner]:
        """The pruners inside, in the order of `part_names`."""
        return [self.get_submodule(name) for name in self.part_names]  # type: ignore[misc]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(layer for part in self.parts for layer in part.tower_layers))

    @property
    def prompt_dependent(self) -> bool:
        return any(part.prompt_dependent for part in self.parts)

    @property
    def learned(self) -> bool:
        return any(part.learned for part in self.parts)

    def build(self, hidden_size: int) -> None:
        for part in self.parts:
            part.build(hidden_size)

    def set_progress(self, progress: float) -> None:
        for part in self.parts:
            part.set_progress(progress)

    def config(self) -> dict[str, Any]:
        values = super().config()
        return values | {name: part.config() for name, part in zip(self.part_names, self.parts, strict=True)}

    def ask(self, part: Pruner, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        """What a part would choose, given the layers of the tower that it asked for."""
        own = self.tower_layers
        if part.tower_layers != own:
            index_L = [own.index(layer) for layer in part.tower_layers]
            tokens = replace(tokens, **_layers(tokens, index_L))
        selection: Selection = part(tokens, num_keep_B)
        return selection

    def ranked(self, part: Pruner, tokens: TokenView) -> Tensor:
        """Scores (B, V) of a part that was asked to keep everything, so that it has ranked every token."""
        # The count of valid tokens is on the device; asking for all V spares the host the look: padding comes last.
        V = tokens.valid_BV.shape[1]
        return self.ask(part, tokens, torch.full((len(tokens.valid_BV),), V)).scores_BV


def _layers(tokens: TokenView, index_L: Sequence[int]) -> dict[str, Any]:
    return {name: value[:, list(index_L)] for name in TOWER_FIELDS if (value := getattr(tokens, name)) is not None}
