"""Which views exist on a model, layer by layer; a plan whose pruners need others is refused before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tpcompress.errors import counted
from tpcompress.families import Parts, list_families
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.shorten.masks import RECURRENT, layer_kind
from tpcompress.insertion.views.registry import providers
from tpcompress.insertion.views.tower import tower_layers
from tpcompress.pruners import Pruner, list_pruners
from tpcompress.pruners.views import VIEWS, ViewSpec


def check_views(parts: Parts, plan: PruningPlan) -> None:
    """Check that every view that the pruners of a plan need exists at their layer.

    Raises:
        ValueError: one does not exist; the message has the reason, and the pruners that would work there.
    """
    for stage in plan.stages:
        reason = why_unavailable(parts, stage.pruner, stage.layer)
        if reason is not None:
            others = {name: cls for name, cls in list_pruners().items() if not cls.keeps_none}
            fit = [name for name, cls in others.items() if _fits(parts, cls, stage.layer)]
            raise ValueError(f"Pruner '{stage.pruner.name}' needs {reason}, or use one of: {', '.join(fit)}.")


def _fits(parts: Parts, cls: type[Pruner], layer: int) -> bool:
    """Whether a pruner with its defaults works at a layer; the code of an export holds the parts of its plan only."""
    try:
        return why_unavailable(parts, cls(), layer) is None
    except (ValueError, KeyError):
        return False


def check_layers(parts: Parts, layers: Sequence[int]) -> None:
    """Check that the model can be pruned at the layers of some stages.

    Raises:
        ValueError: it cannot.
    """
    depth = len(parts.layers)
    for number, layer in enumerate(layers):
        if layer >= depth:
            raise ValueError(f"Stage {number} acts at layer {layer}, but the model has {depth} (0 to {depth - 1}).")
        if layer not in parts.stage_layers:
            raise ValueError(
                f"Stage {number} acts at layer {layer}, but layers after it read the keys of a layer before it; "
                f"this model can be pruned at layers 0 to {parts.stage_layers[-1]}."
            )


def check_moved(parts: Parts, plan: PruningPlan, layers: Sequence[int]) -> None:
    """Check that the stages of a plan can act at other layers.

    Raises:
        ValueError: they cannot.
    """
    own = [stage.layer for stage in plan.stages]
    if len(layers) != len(own):
        given = counted(len(layers), "layer")
        raise ValueError(f"The plan has {counted(len(own), 'stage')}, got {given}; give one each.")
    if any(layer < first for layer, first in zip(layers, own, strict=True)):
        raise ValueError(f"Stages move to later layers only: the plan has them at {own}, got {list(layers)}.")
    if any(after <= before for before, after in pairwise(layers)):
        raise ValueError(f"Layers of stages must rise, got {list(layers)}.")
    check_layers(parts, layers)
    for stage, layer in zip(plan.stages, layers, strict=True):
        reason = why_unavailable(parts, stage.pruner, layer)
        if reason is not None:
            raise ValueError(f"Pruner '{stage.pruner.name}' cannot move to layer {layer}: it needs {reason}.")


def why_unavailable(parts: Parts, pruner: Pruner, layer: int) -> str | None:
    """Which view a pruner does not get at a layer, why, and what would help; None if it gets all."""
    for name in sorted(pruner.needs):
        if name not in VIEWS:
            return f"'{name}', which is no view (views: {', '.join(sorted(VIEWS))}); correct it"
        spec, own = VIEWS[name], providers()[name].why_unavailable
        reason = None
        if spec.at in ("layer_before", "layer_after"):
            reason = _at_layer(parts, spec, layer)
        elif spec.at in ("tower_layer", "tower"):
            reason = _in_tower(parts, spec)
        if reason is None and own is not None:
            reason = own(parts, spec, layer)
        if reason is None and spec.at == "tower_layer":
            reason = _tower_depth(parts, spec, pruner.tower_layers)
        if reason is not None:
            return reason
    return None


def _at_layer(parts: Parts, spec: ViewSpec, layer: int) -> str | None:
    """Reason why a decoder layer before or after the stage has no keys and attention, or None."""
    after, config = spec.at == "layer_after", parts.text_config
    what = "attention of the layer after the stage" if after else f"{spec.name} of the layer before"
    if layer == 0:
        return f"{what}, which does not exist at layer 0; set layer >= 1"
    index = layer if after else layer - 1
    kind = layer_kind(config, index)
    if kind in RECURRENT:
        good = [i for i in parts.stage_layers if i and layer_kind(config, i + index - layer) not in RECURRENT]
        return f"{what}, but layer {index} is of kind {kind}; set layer to one of {', '.join(map(str, good))}"
    return None


def _in_tower(parts: Parts, spec: ViewSpec) -> str | None:
    """Reason why the vision tower of a model cannot be captured, or None."""
    tower = parts.family.tower
    if tower is None:
        known = ", ".join(family.name for family in list_families().values() if family.tower is not None)
        return (
            f"{spec.name}, but the patches of {parts.family.name} cannot be followed to its vision tokens; take one of "
            f"{known}"
        )
    reason = tower.refuse(parts.model.config)
    return None if reason is None else f"{spec.name}, but in this model {reason}; take another model"


def _tower_depth(parts: Parts, spec: ViewSpec, layers: tuple[int, ...]) -> str | None:
    """Reason why the vision tower does not have some layers, or None."""
    depth = len(tower_layers(parts))
    if layers and all(-depth <= layer < depth for layer in layers):
        return None
    return f"{spec.name} of tower layers {layers}, but the tower has layers {-depth} to {depth - 1}; name some of these"
