"""Pruning plans: which pruner acts before which decoder layer, with which budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tpcompress.insertion.budget import Budget, check_budget, check_number, read_budgets
from tpcompress.insertion.plan_source import FORMS, read_source
from tpcompress.pruners import Pruner, create

VERSION = 2
"""Version of the plans written. In version 1, `scope: image` meant `tile` where text separates tiles."""
VERSIONS = (1, 2)
POSITIONS = ("original", "compact")
SCOPES = ("image", "tile", "prompt")
STAGE_KEYS = ("pruner", "layer", "keep_ratio", "keep_tokens")

__all__ = ["POSITIONS", "SCOPES", "VERSION", "Budget", "PruningPlan", "Stage", "check_budget"]


@dataclass(frozen=True, init=False)
class Stage:
    """One pruner before one decoder layer; `layer` is the first layer that sees fewer vision tokens.

    Attributes:
        pruner: a `Pruner`, its name, or `{"type": name, **arguments}`.
        layer: decoder layer index; 0 prunes before the language model.
        keep_ratio: see `Budget`.
        keep_tokens: see `Budget`.

    Raises:
        ValueError: unknown pruner, impossible budget, or a negative layer.
    """

    pruner: Pruner
    layer: int
    keep_ratio: float | None
    keep_tokens: int | None

    def __init__(
        self,
        pruner: Pruner | str | dict[str, Any],
        layer: int = 0,
        keep_ratio: float | None = None,
        keep_tokens: int | None = None,
    ) -> None:
        for name, value in zip(STAGE_KEYS, (create(pruner), layer, keep_ratio, keep_tokens), strict=True):
            object.__setattr__(self, name, value)
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ValueError(f"layer must be a whole number of at least 0, got {layer!r}.")
        check_budget(self.pruner, self.budget)

    @property
    def budget(self) -> Budget:
        """The stage's budget."""
        return Budget(self.keep_ratio, self.keep_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the pruner's weights."""
        budget = {k: v for k in ("keep_ratio", "keep_tokens") if (v := getattr(self, k)) is not None}
        return {"pruner": self.pruner.config(), "layer": self.layer, **budget}


@dataclass(frozen=True)
class PruningPlan:
    """Ordered stages and the policies that they share.

    Attributes:
        stages: at strictly increasing layers, with budgets that never grow; a stage that drops all tokens comes last.
        positions: `original` keeps each token's position id; `compact` renumbers the retained tokens without gaps.
        scope: the budget applies per `image` or video, per `tile` of an image and frame of a video, or to everything in
            a `prompt` together.

    Raises:
        ValueError: no stage, layers that do not increase, budgets that grow, a stage after one that drops all tokens,
            or an unknown policy.
    """

    stages: Sequence[Stage]
    positions: str = "original"
    scope: str = "image"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if not self.stages:
            raise ValueError("A plan needs at least one stage; without pruning, do not attach a plan.")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}.")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}.")
        for i, (before, after) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=1):
            if after.layer <= before.layer:
                raise ValueError(
                    f"Stage {i} acts at layer {after.layer} after stage {i - 1} at layer {before.layer}; "
                    f"layers must increase."
                )
            if before.pruner.keeps_none:
                raise ValueError(
                    f"Stage {i} has no tokens to choose from: stage {i - 1} ('{before.pruner.name}') drops all of "
                    f"them; make that the last stage."
                )
        for field in ("keep_ratio", "keep_tokens"):
            given = [
                (i, stage.layer, v) for i, stage in enumerate(self.stages) if (v := getattr(stage, field)) is not None
            ]
            for (j, _, then), (i, layer, now) in zip(given, given[1:], strict=False):
                if now > then:
                    raise ValueError(
                        f"Stage {i} (layer {layer}) keeps {now} of the vision tokens after stage {j} kept {then}; "
                        f"budgets must not grow."
                    )

    @classmethod
    def of(
        cls,
        source: PruningPlan | Stage | Pruner | str | Path | Mapping[str, Any] | Sequence[Any],
        *,
        keep_tokens: int | Sequence[int] | None = None,
        keep_ratio: float | Sequence[float] | None = None,
        layer: int | None = None,
    ) -> PruningPlan:
        """Read a plan from any of its forms.

        Args:
            source: a plan or a list of stages; a pruner, its name, or `{"type": name, **arguments}`; the short form
                `PRUNER:KEEP@LAYER,...` with a count or a decimal ratio (`divprune:64@0,dart:0.25@8`); a mapping as
                `to_dict` returns it or of a single stage; the path of a plan file or of a recipe (YAML or JSON).
            keep_tokens: count of the pruner; for a plan, one count for its single stage or one per stage, which
                replaces its budgets.
            keep_ratio: the same as ratios.
            layer: decoder layer of the pruner (default 0); not for a plan, whose stages have layers.

        Raises:
            FileNotFoundError: no such file.
            ValueError: none of these forms, a pruner without a budget, or anything that `PruningPlan` refuses.
        """
        budgets = read_budgets(None, keep_tokens, keep_ratio)
        if isinstance(source, str | Path):
            source = read_source(source)
        if isinstance(source, Mapping) and "type" in source:
            source = create(dict(source))
        if isinstance(source, Pruner | str):
            return cls([_stage_of(create(source), budgets, layer or 0)])
        if layer is not None:
            raise ValueError(f"layer={layer} is for a single pruner, but a plan is given; set the layer of its stages.")
        if isinstance(source, Mapping):
            plan = cls.from_dict(source)
        elif isinstance(source, Stage):
            plan = cls([source])
        elif isinstance(source, Sequence) and not isinstance(source, str):
            plan = cls([stage if isinstance(stage, Stage) else _stage_from_dict(stage) for stage in source])
        elif isinstance(source, cls):
            plan = source
        else:
            raise ValueError(f"Not a plan: {source!r}; {FORMS}.")
        return plan if budgets is None else plan.with_budgets(budgets)

    @property
    def prompt_dependent(self) -> bool:
        """Whether the retained tokens depend on the prompt."""
        return any(stage.layer > 0 or stage.pruner.prompt_dependent for stage in self.stages)

    @property
    def reads_prompt(self) -> bool:
        """Whether a pruner scores tokens by the prompt, so that a sequence must hold one question."""
        return any(stage.pruner.prompt_dependent for stage in self.stages)

    def with_budgets(self, budgets: Sequence[Budget]) -> PruningPlan:
        """The plan with other budgets.

        Args:
            budgets: one per stage.

        Raises:
            ValueError: another number of budgets, budgets that grow, or one that its pruner does not accept.
        """
        check_number(budgets, len(self.stages))
        pairs = zip(self.stages, budgets, strict=True)
        stages = [replace(stage, keep_ratio=b.keep_ratio, keep_tokens=b.keep_tokens) for stage, b in pairs]
        return replace(self, stages=stages)

    def counts(self, num_tokens: int) -> list[int]:
        """Nominal retained count of every stage, for a row of `num_tokens` vision tokens."""
        kept: list[int] = []
        for stage in self.stages:
            kept.append(min([stage.budget.count(num_tokens), *kept[-1:]]))
        return kept

    def layer_average(self, num_tokens: int, num_layers: int) -> float:
        """Mean number of vision tokens per decoder layer."""
        seen = [num_tokens] * num_layers
        for stage, kept in zip(self.stages, self.counts(num_tokens), strict=True):
            seen[stage.layer :] = [kept] * (num_layers - stage.layer)
        return sum(seen) / num_layers

    def to_dict(self) -> dict[str, Any]:
        """Plain values with a `version`; the inverse of `from_dict`."""
        stages = [stage.to_dict() for stage in self.stages]
        return {"version": VERSION, "positions": self.positions, "scope": self.scope, "stages": stages}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], allow_outside: bool = True) -> PruningPlan:
        """Build a plan from plain values; a mapping with `pruner` instead of `stages` is a plan of one stage.

        Args:
            values: as returned by `to_dict`.
            allow_outside: whether a pruner, or one nested in it, may be the dotted path of a class outside the package,
                which is then imported.

        Raises:
            ValueError: unknown key or version, a pruner from outside that is not allowed, or anything that
                `PruningPlan` and `Stage` refuse.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"A plan is a mapping with `stages`, or with `pruner` and a budget, got {values!r}.")
        values = dict(values)
        version = values.pop("version", VERSION)
        if version not in VERSIONS:
            read = " and ".join(map(str, VERSIONS))
            raise ValueError(f"This plan has version {version!r}, this tpcompress reads {read}; update tpcompress.")
        if "stages" not in values:
            values["stages"] = [{k: values.pop(k) for k in STAGE_KEYS if k in values}]
        _no_other_keys(values, ("stages", "positions", "scope"), "plan")
        stages = values.pop("stages")
        if not isinstance(stages, list | tuple):
            raise ValueError(f"`stages` is a list of stages, got {stages!r}; put a `-` before each in YAML.")
        return cls([_stage_from_dict(stage, allow_outside) for stage in stages], **values)

    def to_yaml(self) -> str:
        """The plan as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_yaml(cls, text: str) -> PruningPlan:
        """Parse the text of `to_yaml` or of `to_json`."""
        return cls.from_dict(yaml.safe_load(text))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Parse the text of `to_json`."""
        return cls.from_dict(json.loads(text))


def _stage_of(pruner: Pruner, budgets: Sequence[Budget] | None, layer: int) -> Stage:
    """A stage for a pruner that is given by itself."""
    if budgets is None:
        raise ValueError(
            f"Pruner '{pruner.name}' needs a budget; give keep_tokens or keep_ratio, or write {pruner.name}:64."
        )
    check_number(budgets, 1)
    return Stage(pruner, layer, budgets[0].keep_ratio, budgets[0].keep_tokens)


def _stage_from_dict(values: Any, allow_outside: bool = True) -> Stage:
    if not isinstance(values, Mapping) or "pruner" not in values:
        raise ValueError(f"A stage is a mapping with `pruner`, `layer` and a budget, got {values!r}.")
    _no_other_keys(values, STAGE_KEYS, "stage")
    return Stage(**{**values, "pruner": create(values["pruner"], allow_outside)})


def _no_other_keys(values: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"Unknown {what} key {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
