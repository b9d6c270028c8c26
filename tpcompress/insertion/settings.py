"""What can be set on an attached model: mode, budgets and layers of the stages, forced tokens, open records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpcompress.insertion.budget import Budget, check_number
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.pruners.views import LAYER_BEFORE_VIEWS

MODES = ("drop", "mask", "off", "learn")
"""`learn` is `mask` in training, where gates of learned pruners act, and `drop` in evaluation."""


@dataclass(frozen=True)
class Placement:
    """The layers of the stages, and which layers need a hook because of them.

    Attributes:
        layers: one per stage.
        stage_at: index of the stage by layer.
        watched: layers whose input is kept, because the stage after them reads their keys, values or attention.
        looks_ahead: layers with a stage that reads their attention before the cut.
        hooked: layers whose arguments can change.
    """

    layers: tuple[int, ...]
    stage_at: Mapping[int, int]
    watched: frozenset[int]
    looks_ahead: frozenset[int]
    hooked: frozenset[int]

    @classmethod
    def of(cls, plan: PruningPlan, layers: Sequence[int], depth: int) -> Placement:
        """The stages of a plan at given layers of a model with `depth` decoder layers."""
        placed = [(stage.pruner, layer) for stage, layer in zip(plan.stages, layers, strict=True)]
        watched = {layer - 1 for pruner, layer in placed if layer and pruner.needs & LAYER_BEFORE_VIEWS}
        # Token sizes and gates that are set before the language model act in every layer.
        every = any(not layer and (pruner.uses_token_sizes or pruner.gates) for pruner, layer in placed)
        first = 0 if every else min((layer for layer in layers if layer), default=depth)
        return cls(
            layers=tuple(layers),
            stage_at={layer: number for number, layer in enumerate(layers)},
            watched=frozenset(watched),
            looks_ahead=frozenset(layer for pruner, layer in placed if layer and "attention_next" in pruner.needs),
            hooked=frozenset(range(first, depth)) | watched,
        )


@dataclass(frozen=True)
class Settings:
    """Settings under which calls run. They hold in one context; see `Attachment.using`.

    Attributes:
        mode: one of `MODES`.
        budgets: one per stage.
        placement: the layers of the stages.
        retained: stages of an earlier call by number, whose retained tokens are retained again; None without.
        traces: open records.
        mode_chosen: the mode was set for a block, and is not that of `attach`.
    """

    mode: str
    budgets: tuple[Budget, ...]
    placement: Placement
    retained: Mapping[int, StageTrace] | None = None
    traces: tuple[Trace, ...] = ()
    mode_chosen: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        check_number(self.budgets, len(self.placement.layers))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the stages."""
        return self.placement.layers
