"""Which views exist on a model, layer by layer; what is missing is refused before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tpcompress.families import Parts, list_families
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.shorten.masks import RECURRENT, layer_kind
from tpcompress.insertion.views.tower import tower_layers
from tpcompress.pruners import Pruner, list_pruners
from tpcompress.pruners.base import LAYER_VIEWS, LOOSE_VIEWS, TOWER_VIEWS

WORDS = LAYER_VIEWS | TOWER_VIEWS | {"text", "input", "normed", "joint"}
"""Everything that a pruner can need."""


def check_views(parts: Parts, plan: PruningPlan) -> None:
    """See that every pruner of a plan gets the views that it needs.

    Raises:
        ValueError: one does not; the message says why, and which pruners would work there.
    """
    for stage in plan.stages:
        reason = why_unavailable(parts, stage.pruner, stage.layer)
        if reason is not None:
            others = {name: cls for name, cls in list_pruners().items() if not cls.keeps_none}
            fit = [name for name, cls in others.items() if why_unavailable(parts, cls(), stage.layer) is None]
            raise ValueError(f"Pruner '{stage.pruner.name}' needs {reason}, or use one of: {', '.join(fit)}.")


def check_layers(parts: Parts, layers: Sequence[int]) -> None:
    """See that the model can be pruned at the layers of some stages.

    Raises:
        ValueError: it cannot.
    """
    depth = len(parts.layers)
    for number, layer in enumerate(layers):
        if layer >= depth:
            raise ValueError(f"Stage {number} acts at layer {layer}, but the model has {depth} (0 to {depth - 1}).")
        if layer not in parts.stage_layers:
            raise ValueError(
                f"Stage {number} acts at layer {layer}, but layers behind it read the keys of a layer before it; "
                f"this model can be pruned at layers 0 to {parts.stage_layers[-1]}."
            )


def check_moved(parts: Parts, plan: PruningPlan, layers: Sequence[int]) -> None:
    """See that the stages of a plan can act at other layers.

    Raises:
        ValueError: they cannot.
    """
    own = [stage.layer for stage in plan.stages]
    if len(layers) != len(own):
        raise ValueError(f"The plan has {len(own)} stages, got {len(layers)} layers; give one each.")
    if any(layer < first for layer, first in zip(layers, own, strict=True)):
        raise ValueError(f"Stages move to later layers only: the plan has them at {own}, got {list(layers)}.")
    if any(after <= before for before, after in pairwise(layers)):
        raise ValueError(f"Layers of stages must rise, got {list(layers)}.")
    check_layers(parts, layers)
    for stage, layer in zip(plan.stages, layers, strict=True):
        reason = why_unavailable(parts, stage.pruner, layer)
        if reason is not None:
            raise ValueError(f"Pruner '{stage.pruner.name}' cannot move to layer {layer}: it needs {reason}.")


def why_unavailable(parts: Parts, rule: Pruner, layer: int) -> str | None:
    """Which view a pruner does not get at a layer, why, and what would help; None if it gets all."""
    for word in sorted(rule.needs):
        if word in LAYER_VIEWS:
            reason = _before_layer(parts, word, layer)
        elif word in TOWER_VIEWS:
            reason = _in_tower(parts, word, rule.tower_layers, layer)
        elif word == "joint":
            reason = (
                f"CLIP's projections and text tower, but no {parts.family.name} checkpoint holds them; give the pruner "
                f"weights of its own"
            )
        else:
            reason = (
                None if word in WORDS else f"'{word}', which is no view (views: {', '.join(sorted(WORDS))}); correct it"
            )
        if reason is not None:
            return reason
    return None


def _before_layer(parts: Parts, word: str, layer: int) -> str | None:
    ahead, config = word == "attention_next", parts.text_config
    what = "attention of the layer behind the stage" if ahead else f"{word} of the layer before"
    if layer == 0:
        return f"{what}, which does not exist at layer 0; set layer >= 1"
    index = layer if ahead else layer - 1
    kind = layer_kind(config, index)
    if kind in RECURRENT:
        good = [i for i in parts.stage_layers if i and layer_kind(config, i + index - layer) not in RECURRENT]
        return f"{what}, but layer {index} is of kind {kind}; set layer to one of {', '.join(map(str, good))}"
    if word not in ("keys", "values") and config._attn_implementation == "flex_attention":
        return f"{what}, but the masks of flex attention cannot be read; load with attn_implementation='sdpa'"
    return None


def _in_tower(parts: Parts, word: str, layers: tuple[int, ...], stage: int) -> str | None:
    tower, config, name = parts.family.tower, parts.model.config, parts.family.name
    if tower is None:
        known = ", ".join(family.name for family in list_families().values() if family.tower is not None)
        return f"{word}, but the patches of {name} cannot be followed to its vision tokens; take one of {known}"
    reason = tower.refuse(config)
    if reason is not None:
        return f"{word}, but in this model {reason}; take another model"
    if word.startswith("tower_cls") and not tower.has_class(config):
        return f"{word}, but the tower of this model has no class token; read tower_received instead"
    if word == "projector" and tower.projected is None:
        known = ", ".join(f.name for f in list_families().values() if f.tower is not None and f.tower.projected)
        return f"{word}, but the projector of {name} does not work token by token; take one of {known}"
    if word == "projector" and stage > 0:
        return f"{word}, whose values are those of the language model's input; set layer: 0"
    if word in LOOSE_VIEWS:
        return None
    depth = len(tower_layers(parts))
    far = [layer for layer in layers if not -depth <= layer < depth]
    if far or not layers:
        return f"{word} of tower layers {layers}, but the tower has layers {-depth} to {depth - 1}; name some of these"
    return None
