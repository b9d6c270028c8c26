"""A pruner that only looks, and where the tokens of its rows stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from reference import row_positions
from torch import Tensor

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, record
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.insertion.trace import StageTrace
from tpcompress.pruners import Pruner, Selection, TokenView
from tpcompress.pruners.topk import keep_topk

LAYER_WORDS = ("text", "keys", "values", "attention", "attention_prompt", "attention_last_vision")


class Looks(Pruner):
    """Keeps the last tokens, and needs whatever it is told to."""

    name = "looks"

    def __init__(self, words: Iterable[str] = (), layers: Iterable[int] = (-2,)) -> None:
        super().__init__()
        self.words, self.layers = tuple(words), tuple(layers)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.words)

    @property
    def tower_layers(self) -> tuple[int, ...]:
        return self.layers

    def forward(self, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        scores_BV = torch.arange(tokens.valid_BV.shape[1]).expand_as(tokens.valid_BV).float()
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)


def plan_of(*words: str, layer: int = 0, layers: Iterable[int] = (-2,), **policies: Any) -> PruningPlan:
    """One stage that looks."""
    return PruningPlan([Stage(Looks(words, layers), layer, keep_tokens=3)], **policies)


def seen(model: Any, plan: PruningPlan, inputs: dict[str, Any], **more: Any) -> tuple[StageTrace, Any]:
    """The last stage of a call, and what the model returned."""
    attach(model, plan)
    with record(model) as trace, torch.no_grad():
        out = model(**inputs, **more)
    return trace.stages[-1], out


def tokens_of(stage: StageTrace, inputs: dict[str, Any], model: Any) -> list[tuple[int, list[int]]]:
    """(sample, positions) of each row of a stage that nothing was cut before."""
    spots = row_positions(inputs["input_ids"], stage, resolve(model).placeholder_ids)
    return [(row[0][0], [place for _, place in row]) for row in spots]
