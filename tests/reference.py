"""The reference of every exactness test: the base at full length, in which layers from K on cannot see dropped tokens.

Nothing of the insertion is used here but the record of which tokens were retained.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpcompress.families import resolve
from tpcompress.insertion.trace import StageTrace, Trace
from tpcompress.pruners import Selection

Spot = tuple[int, int]
"""(sample, position)."""


@dataclass
class Reference:
    """What is hidden where.

    Attributes:
        dropped: per stage, bool (B, S): positions that are gone from its layer on.
        layers: first layer of each stage.
        values: per stage, new values of merged tokens.
        sizes: per stage, fp32 (B, S): how many tokens the key of each position counts for from its layer on.
        places: per stage, int64 (B, S): the position whose id each one takes from its layer on.
        compact: whether positions close up at each stage.
    """

    dropped: list[Tensor]
    layers: list[int]
    values: list[dict[Spot, Tensor]]
    sizes: list[Tensor]
    places: list[Tensor]
    compact: bool = False
    positions: Any = field(default=None, init=False)

    @classmethod
    def of(cls, trace: Trace, inputs: dict[str, Any], model: Any, compact: bool = False) -> Reference:
        """Read what was retained out of a trace; everything else is worked out here, from the ids."""
        dropped: list[Tensor] = []
        layers, values = [], []
        sizes = [torch.ones(inputs["input_ids"].shape)]
        places = [torch.arange(inputs["input_ids"].shape[1]).expand(inputs["input_ids"].shape)]
        for stage in trace.stages:
            spots = row_positions(inputs["input_ids"], stage, resolve(model).placeholder_ids)
            gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
            for r, row in enumerate(spots):
                for v, (b, s) in enumerate(row):
                    gone[b, s] = not bool(stage.retained_RV[r, v])
            here = [[spot for spot in row if not dropped or not dropped[-1][spot]] for row in spots]
            values.append(merged_values(stage.selection, here, gone))
            sizes.append(told_sizes(stage.selection, here, sizes[-1]))
            places.append(told_places(stage.selection, here, places[-1]))
            dropped.append(gone)
            layers.append(stage.layer)
        return cls(dropped, layers, values, sizes[1:], places[1:], compact)

    @property
    def kept(self) -> Tensor:
        """bool (B, S): what is left at the end."""
        return ~self.dropped[-1]

    @contextmanager
    def on(self, model: Any, inputs: dict[str, Any]) -> Iterator[None]:
        """Put the reference into an unattached model for one call with these inputs."""
        parts = resolve(model)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        with ExitStack() as stack:
            hook = parts.language_model.register_forward_pre_hook(self._at_input, with_kwargs=True)
            stack.callback(hook.remove)
            for i, layer in enumerate(parts.layers):
                at = [n for n, k in enumerate(self.layers) if k <= i]
                if not at:
                    continue
                kind = kind_of(parts.text_config, i)
                if kind in ("conv", "linear_attention"):
                    stack.enter_context(self._alone(layer, i, at[-1], real))
                    continue
                hook = layer.register_forward_pre_hook(self._hook(parts, i, at[-1], kind, real), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _at_input(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.positions = kwargs.get("position_ids")
        if self.layers[0] == 0 and self.values[0]:
            kwargs = kwargs | {"inputs_embeds": _with_values(kwargs["inputs_embeds"], self.values[0])}
        return args, kwargs

    def _hook(self, parts: Any, index: int, stage: int, kind: str, real: Tensor) -> Any:
        def pre(layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.layers[stage] == index > 0:
                hidden = _with_values(hidden, self.values[stage])
            kwargs = dict(kwargs)
            alive = ~self.dropped[stage]
            allowed = self._allowed(parts, kind, alive & real, kwargs.get("attention_mask"))
            moved = bool((self.places[stage] != torch.arange(alive.shape[1])).any())
            if self.compact or moved:
                positions = self._closed(hidden, alive, real) if self.compact else self._moved(stage)
                embed = getattr(parts.language_model, "rotary_emb", None) or parts.language_model.pos_emb
                more = (kind,) if "layer_type" in inspect.signature(type(embed).forward).parameters else ()
                kwargs["position_embeddings"] = embed(hidden, positions, *more)
                kwargs["position_ids"] = positions
            low = torch.finfo(hidden.dtype).min
            weight = self.sizes[stage].log()[:, None].expand(allowed.shape)
            kwargs["attention_mask"] = weight[:, None].masked_fill(~allowed[:, None], low)
            return (hidden, *args[1:]), kwargs if args else kwargs | {"hidden_states": hidden}

        return pre

    @staticmethod
    def _allowed(parts: Any, kind: str, seen: Tensor, own: Tensor | None) -> Tensor:
        """bool (B, S, S): who looks at whom, from what the base itself allows at full length."""
        S = seen.shape[1]
        causal = torch.ones(S, S, dtype=torch.bool).tril()
        allowed = causal.expand(len(seen), S, S)
        both_ways, far = None, torch.zeros(S, S, dtype=torch.bool)
        if own is not None:
            opened = (own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2)[:, 0]
            forward = opened & ~causal
            both_ways = forward | forward.mT
            allowed = allowed | both_ways
        if kind == "sliding_attention":
            # A window counts what is there; blocks that the base lets reach beyond it still do.
            window = parts.text_config.sliding_window
            rank, place = seen.cumsum(1), torch.arange(S)
            far = place[:, None] - place >= window
            inside = rank[:, :, None] - rank[:, None] < window
            beyond = both_ways is not None and bool((opened & both_ways & far).any())
            allowed = allowed & (inside | both_ways) if beyond else allowed & inside
        return (allowed & seen[:, None]) | torch.eye(S, dtype=torch.bool)

    def _moved(self, stage: int) -> Tensor:
        """Position ids of which some stand elsewhere."""
        B, S = self.places[stage].shape
        positions = torch.arange(S)[None] if self.positions is None else self.positions
        if positions.ndim < 3:
            return positions.expand(B, S).gather(1, self.places[stage])
        positions = positions[-3:].expand(3, B, S)
        return torch.stack([axis.gather(1, self.places[stage]) for axis in positions])

    def _closed(self, hidden: Tensor, alive: Tensor, real: Tensor) -> Tensor:
        """Position ids without values that no retained token has, in plain loops."""
        B, S = alive.shape
        positions = torch.arange(S)[None] if self.positions is None else self.positions
        if positions.ndim == 3:
            positions = positions[-3:].expand(3, B, S).clone()
            for b in range(B):
                used = set(positions[:, b][:, real[b]].flatten().tolist())
                still = set(positions[:, b][:, real[b] & alive[b]].flatten().tolist())
                freed = sorted(used - still)
                for axis in range(3):
                    for s in range(S):
                        value = int(positions[axis, b, s])
                        positions[axis, b, s] = value - sum(f < value for f in freed)
            return positions
        return positions.expand(B, S) - (~alive).cumsum(1)

    @contextmanager
    def _alone(self, layer: Any, index: int, stage: int, real: Tensor) -> Iterator[None]:
        """Layers that carry a state get each sample's retained columns and nothing else."""
        own = layer.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.layers[stage] == index > 0:
                hidden = _with_values(hidden, self.values[stage])
            out = hidden.clone()
            kwargs = kwargs | {"attention_mask": None, "past_key_values": None}
            for b in range(len(hidden)):
                left = (real[b] & ~self.dropped[stage][b]).nonzero()[:, 0]
                out[b, left] = own(hidden[b : b + 1, left], *args, **kwargs)[0]
            return out

        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward


def kind_of(config: Any, index: int) -> str:
    """Full or sliding attention, or a layer that carries a state."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return str(kinds[index])
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def _with_values(hidden: Tensor, values: dict[Spot, Tensor]) -> Tensor:
    hidden = hidden.clone()
    for (b, s), value in values.items():
        hidden[b, s] = value
    return hidden


def row_positions(ids: Tensor, stage: StageTrace, tokens: dict[str, int]) -> list[list[Spot]]:
    """Where the vision tokens of each budget row stand; separators are none."""
    places = {name: [(b, s) for b, s in (ids == token).nonzero().tolist()] for name, token in tokens.items()}
    first: dict[str, int] = {}
    found: dict[int, list[Spot]] = {}
    for r, layouts in enumerate(stage.layouts):
        for layout in layouts:
            name = "video" if layout.video else "image"
            start = first.get(name, 0)
            found.setdefault(r, []).extend(places[name][start + int(v)] for v in layout.table[:, 0])
            first[name] = start + layout.placeholders
    assert all(len(places[name]) == end for name, end in first.items()), "every placeholder belongs to a picture"
    rows = [sorted(found[r]) for r in range(len(stage.layouts))]
    assert [len(row) for row in rows] == stage.total
    assert [{b for b, _ in row} for row in rows] == [{owner} for owner in stage.owner]
    return rows


def merged_values(selection: Selection | None, here: list[list[Spot]], gone: Tensor) -> dict[Spot, Tensor]:
    """Where the values that a pruner wrote belong; `here` is what each row still had."""
    if selection is None or selection.vision_BVD is None:
        return {}
    told = enumerate(here)
    return {spot: selection.vision_BVD[r, v] for r, row in told for v, spot in enumerate(row) if not gone[spot]}


def told_sizes(selection: Selection | None, here: list[list[Spot]], before: Tensor) -> Tensor:
    """Sizes after a pruner said how many of the tokens that were there each one stands for."""
    sizes = before.clone()
    if selection is not None and selection.size_BV is not None:
        for r, row in enumerate(here):
            for v, spot in enumerate(row):
                sizes[spot] = before[spot] * selection.size_BV[r, v]
    return sizes


def told_places(selection: Selection | None, here: list[list[Spot]], before: Tensor) -> Tensor:
    """Whose position each one has after a pruner moved tokens."""
    places = before.clone()
    if selection is not None and selection.place_BV is not None:
        for r, row in enumerate(here):
            for v, spot in enumerate(row):
                places[spot] = before[row[int(selection.place_BV[r, v])]]
    return places


def aligned(full: Tensor, kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What is kept of a full-length tensor (B, S, ...), right-aligned to `width`, and where it is (B, width)."""
    out = full.new_zeros(len(full), width, *full.shape[2:])
    there = torch.zeros(len(full), width, dtype=torch.bool)
    for b in range(len(full)):
        part = full[b][kept[b]]
        out[b, width - len(part) :] = part
        there[b, width - len(part) :] = True
    return out, there
