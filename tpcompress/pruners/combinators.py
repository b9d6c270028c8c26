"""Base class of combinators, pruners that contain pruners, and quotas for groups of tokens.

B rows, V tokens, L layers of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.gate_components import Choice, Scores
from tpcompress.pruners.gated import GatedPruner, merge_weights, reordered
from tpcompress.pruners.registry import create
from tpcompress.pruners.topk import on, rank
from tpcompress.pruners.views import TOWER_FIELDS, TOWER_LAYERS

SHARES = ("equal", "proportional")


class Composed(GatedPruner):
    """A pruner whose parts are pruners; subclasses list their arguments that name one in `part_names`.

    A part is given as a pruner, its name, or `{"type": name, **arguments}`; one from outside this package not by name.
    A part that learns gives the combinator its gates: selector and applier act on what the combinator makes of its
    scores, and its weights are saved and loaded as the combinator's own.

    Raises:
        ValueError: a part is a dotted path or retains nothing; or, where parts must only rank, it merges, chooses its
            own count, or learns in other ways than a `GatedPruner`.
    """

    part_names: tuple[str, ...] = ("pruner",)
    only_rank: ClassVar[bool] = False
    """Parts are read for their ranking alone, so that their new values, gates and counts would be lost."""

    def __init__(self, **parts: Pruner | str | dict[str, Any]) -> None:
        super().__init__()
        for argument, given in parts.items():
            if isinstance(given, str) and "." in given:
                # It may come from an untrusted checkpoint; `create` has built all mappings that are allowed.
                raise ValueError(
                    f"{self.name} does not import '{given}' from outside tpcompress; write {{type: {given}}} instead."
                )
            part = create(given, allow_outside=False)
            reasons = {"retains nothing": part.keeps_none}
            if self.only_rank:
                reasons |= {
                    "merges tokens": part.merges,
                    "chooses its own count": not part.exact_count,
                    "learns, but is no GatedPruner": part.learned and not isinstance(part, GatedPruner),
                }
            # The parts of a learned gate that merge or count are its applier and its selector.
            advice = "take another selector or applier" if hasattr(part, "applier") else "name another pruner"
            for reason, holds in reasons.items():
                if holds:
                    raise ValueError(f"{self.name} cannot build on '{part.name}', which {reason}; {advice}.")
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
        layers = dict.fromkeys(layer for part in self.parts if _reads_tower(part) for layer in part.tower_layers)
        return tuple(layers) or TOWER_LAYERS

    @property
    def prompt_dependent(self) -> bool:
        return any(part.prompt_dependent for part in self.parts)

    def build(self, hidden_size: int) -> None:
        for part in self.parts:
            part.build(hidden_size)

    def set_progress(self, progress: float) -> None:
        for part in self.parts:
            part.set_progress(progress)

    def config(self) -> dict[str, Any]:
        values = super().config()
        return values | {name: part.config() for name, part in zip(self.part_names, self.parts, strict=True)}

    @property
    def learner(self) -> GatedPruner | None:
        """The part that learns, whose gates are the combinator's: the first one of those in use."""
        return next((part for part in self.parts if part.learned and isinstance(part, GatedPruner)), None)

    @property
    def learned(self) -> bool:
        return self.learner is not None

    def adopt(self) -> None:
        """Take over how the learned part trains; subclasses call it at the end of `__init__`."""
        if (part := self.learner) is None:
            return
        self.differentiable, self.trainable_when_cut = True, part.trainable_when_cut
        self.trains_through_model, self.gates = part.trains_through_model, part.gates
        if part.untrained_equivalent is not None:
            argument = self.part_names[self.parts.index(part)]
            self.untrained_equivalent = self.config() | {argument: {"type": part.untrained_equivalent}}

    def score(self, tokens: TokenView, num_keep_B: Tensor) -> Scores:
        assert self.learner is not None
        scores = self.learner.score(self.view_of(self.learner, tokens), num_keep_B)
        with torch.no_grad():
            place_BV = self.order(tokens, scores.scores_BV.detach(), num_keep_B)
        return replace(scores, scores_BV=reordered(scores.scores_BV, place_BV, tokens.valid_BV))

    def order(self, tokens: TokenView, scores_BV: Tensor, num_keep_B: Tensor) -> Tensor:
        """Place (B, V) of each token by these scores of the learned part, 0 = best: theirs, unless it is overridden."""
        return rank(scores_BV, tokens.valid_BV)

    def choose(self, tokens: TokenView, scores: Scores, num_keep_B: Tensor) -> Choice:
        assert self.learner is not None
        return self.learner.choose(self.view_of(self.learner, tokens), scores, num_keep_B)

    def apply_gates(self, tokens: TokenView, choice: Choice) -> Selection:
        assert self.learner is not None
        return self.learner.apply_gates(self.view_of(self.learner, tokens), choice)

    def chosen(self, tokens: TokenView, num_keep_B: Tensor) -> Choice:
        """What the one part retains, with its gates if it learns."""
        if self.learned:
            return self.choose(tokens, self.score(tokens, num_keep_B), num_keep_B)
        selection = self.select_with(self.parts[0], tokens, num_keep_B)
        return Choice(selection.keep_BV, selection.scores_BV)

    def member_weights(self, tokens: TokenView, choice: Choice) -> Tensor | None:
        """How much each token counts in its group where the merge carries the gradient of gates; None for 1."""
        return merge_weights(choice, tokens.soft, full_length=not self.trainable_when_cut)

    def with_values(self, tokens: TokenView, choice: Choice, vision_BVD: Tensor, **more: Any) -> Selection:
        """The choice with new values of the tokens, on which its gates act where they train.

        Args:
            tokens: what the choice was made from.
            choice: of `chosen`.
            vision_BVD: new values.
            **more: further fields of the selection.
        """
        if not self.learned:
            return Selection(choice.keep_BV, choice.scores_BV, vision_BVD=vision_BVD, **more)
        gated = self.apply_gates(replace(tokens, vision_BVD=vision_BVD), choice)
        return replace(gated, vision_BVD=vision_BVD if gated.vision_BVD is None else gated.vision_BVD, **more)

    def view_of(self, part: Pruner, tokens: TokenView) -> TokenView:
        """The view of a part: with the tower layers that it reads."""
        own = self.tower_layers
        if not _reads_tower(part) or part.tower_layers == own:
            return tokens
        return replace(tokens, **_layers(tokens, [own.index(layer) for layer in part.tower_layers]))

    def select_with(self, part: Pruner, tokens: TokenView, num_keep_B: Tensor) -> Selection:
        """Selection of a part, given the tower layers that it reads."""
        selection: Selection = part(self.view_of(part, tokens), num_keep_B)
        return selection

    def ranked(self, part: Pruner, tokens: TokenView) -> Tensor:
        """Scores (B, V) of a part at full budget, so that every token is ranked."""
        # The count of valid tokens is on the device; a budget of V avoids a host-device sync: padding ranks last.
        V = tokens.valid_BV.shape[1]
        return self.select_with(part, tokens, torch.full((len(tokens.valid_BV),), V)).scores_BV

    def ranking(self, part: Pruner, tokens: TokenView, num_keep_B: Tensor) -> Tensor:
        """Place (B, V) of each token, 0 = best: what the part retains within this budget, then the rest by its scores.

        The scores of pruners such as `dart` do not determine what they retain.
        """
        place_BV = rank(self.ranked(part, tokens), tokens.valid_BV)
        return places((~self.select_with(part, tokens, num_keep_B).keep_BV).long(), place_BV)


def quotas(place_BV: Tensor, group_BV: Tensor, valid_BV: Tensor, num_keep_B: Tensor, share: str = "equal") -> Selection:
    """The best tokens of each group, in shares that differ by no more than they must.

    equal          order by (place in the group, place): one token of every group, then a second one, ...; a group that
                   has run out leaves its part to the others, and the last incomplete round goes to the best tokens.
    proportional   floor(k n / N) of a group of n of the N tokens, and one more for the largest remainders.

    Args:
        place_BV: place of each token in its row, all different, 0 = best.
        group_BV: int64, any numbers.
        valid_BV: bool (B, V).
        num_keep_B: int64 (B,).
        share: "equal" or "proportional".

    Returns:
        Exactly `num_keep` tokens per row, with scores_BV = - place in that order.
    """
    inside_BV, group_BV = place_inside(place_BV, group_BV, valid_BV)
    count_B1, key_BV = on(num_keep_B, inside_BV)[:, None], inside_BV
    if share == "proportional":
        size_BV = torch.zeros_like(group_BV).scatter_add(1, group_BV, valid_BV.long()).gather(1, group_BV)
        total_B1 = valid_BV.sum(1, keepdim=True).clamp(min=1)
        ahead_BV = inside_BV - count_B1 * size_BV // total_B1  # < 0: surely kept; 0: its group's remainder decides
        key_BV = torch.where(ahead_BV == 0, total_B1 - count_B1 * size_BV % total_B1, total_B1 + ahead_BV)
        key_BV = key_BV.masked_fill(ahead_BV < 0, 0)
    key_BV = key_BV.masked_fill(~valid_BV, torch.iinfo(torch.long).max)
    final_BV = places(key_BV, place_BV)
    return Selection((final_BV < count_B1) & valid_BV, -final_BV.float())


def places(key_BV: Tensor, place_BV: Tensor) -> Tensor:
    """Place of each token when sorted by key, the smallest first, and by `place_BV` where keys are equal."""
    order_BV = place_BV.argsort(1)
    return _inverse(order_BV.gather(1, key_BV.gather(1, order_BV).argsort(dim=1, stable=True)))


def place_inside(place_BV: Tensor, group_BV: Tensor, valid_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each token among the tokens of its group, 0 = best, and the groups numbered from 0 without gaps."""
    group_BV = group_BV.masked_fill(~valid_BV, torch.iinfo(torch.long).max)
    sorted_BV = places(group_BV, place_BV)
    order_BV, column_V = _inverse(sorted_BV), torch.arange(valid_BV.shape[1], device=valid_BV.device)
    starts_BV = group_BV.gather(1, order_BV).diff(dim=1, prepend=group_BV.new_full((len(group_BV), 1), -1)) != 0
    first_BV = torch.where(starts_BV, column_V, 0).cummax(1).values
    number_BV = starts_BV.cumsum(1) - 1
    return (column_V - first_BV).gather(1, sorted_BV), number_BV.gather(1, sorted_BV)


def _inverse(order_BV: Tensor) -> Tensor:
    """The permutation that undoes another."""
    column_BV = torch.arange(order_BV.shape[1], device=order_BV.device).expand_as(order_BV)
    return torch.empty_like(order_BV).scatter_(1, order_BV, column_BV)


def _reads_tower(part: Pruner) -> bool:
    return any(view.startswith("tower_") for view in part.needs)


def _layers(tokens: TokenView, index_L: Sequence[int]) -> dict[str, Any]:
    return {
        name: value[:, list(index_L)] for name in TOWER_FIELDS.values() if (value := getattr(tokens, name)) is not None
    }
