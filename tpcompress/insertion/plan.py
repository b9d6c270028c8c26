"""The plan: which pruner acts before which layer, on which budget. Validated, versioned, YAML and JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tpcompress.pruners import Pruner, create

VERSION = 1
POSITIONS = ("original", "compact")
SCOPES = ("image", "prompt")


@dataclass(frozen=True)
class Budget:
    """How many vision tokens a stage keeps: exactly one of the two fields is set.

    Attributes:
        keep_ratio: share, in (0, 1], of the vision tokens that the projector produced, whatever came before.
        keep_tokens: the count itself; rows with fewer tokens keep all. 0 is for a pruner that withdraws.
    """

    keep_ratio: float | None = None
    keep_tokens: int | None = None

    def __post_init__(self) -> None:
        ratio, tokens = self.keep_ratio, self.keep_tokens
        if (ratio is None) == (tokens is None):
            given = "both" if ratio is not None else "neither"
            raise ValueError(
                f"A stage needs exactly one of keep_ratio and keep_tokens, got {given}; remove or add one."
            )
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1):
            raise ValueError(f"keep_ratio must be in (0, 1], got {ratio!r}; to keep all tokens, drop the stage.")
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
            raise ValueError(f"keep_tokens must be a whole number of at least 1, got {tokens!r}.")

    def count(self, num_tokens: int) -> int:
        """Number to keep of `num_tokens`: the one place where a ratio is rounded, max(1, round(r V))."""
        if self.keep_tokens is not None:
            return min(self.keep_tokens, num_tokens)
        assert self.keep_ratio is not None
        return min(max(1, round(self.keep_ratio * num_tokens)), num_tokens)

    def __str__(self) -> str:
        return f"{self.keep_tokens} tokens" if self.keep_tokens is not None else f"{self.keep_ratio:g} of the tokens"


def check_budget(pruner: Pruner, budget: Budget) -> None:
    """See that a budget is 0 for a pruner that withdraws, and for no other.

    Raises:
        ValueError: it is not.
    """
    if pruner.keeps_none and budget.keep_tokens != 0:
        raise ValueError(f"Pruner '{pruner.name}' retains nothing, got a budget of {budget}; write keep_tokens: 0.")
    if budget.keep_tokens == 0 and not pruner.keeps_none:
        raise ValueError(
            f"Pruner '{pruner.name}': keep_tokens must be a whole number of at least 1, got 0; a stage that drops "
            f"every vision token is one of 'vtw'."
        )


@dataclass(frozen=True, init=False)
class Stage:
    """One pruner at one place. Layers 0 .. layer-1 see every vision token; `layer` is the first that sees fewer.

    Attributes:
        pruner: a `Pruner`, its name, or `{"type": name, **arguments}`.
        layer: index of that decoder layer; 0 is before the language model.
        keep_ratio, keep_tokens: the budget, see `Budget`.

    Raises:
        ValueError: unknown pruner, impossible budget, or a layer below 0.
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
        for name, value in (
            ("pruner", create(pruner)),
            ("layer", layer),
            ("keep_ratio", keep_ratio),
            ("keep_tokens", keep_tokens),
        ):
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
    """Ordered stages and the policies they share.

    Attributes:
        stages: at rising layers, with budgets that never grow; one that withdraws every token is the last.
        positions: `original` keeps each token's position id; `compact` renumbers what is retained without gaps.
        scope: the budget holds per `image`, or over all images of a `prompt`.

    Raises:
        ValueError: no stage, layers that do not rise, budgets that grow, a stage after all tokens were withdrawn,
            unknown policy.
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
                    f"layers must rise."
                )
            if before.pruner.keeps_none:
                raise ValueError(
                    f"Stage {i} has nothing to choose from: stage {i - 1} ('{before.pruner.name}') withdraws all "
                    f"tokens; make that the last stage."
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

    @property
    def prompt_dependent(self) -> bool:
        """The retained tokens depend on the prompt."""
        return any(stage.layer > 0 or stage.pruner.prompt_dependent for stage in self.stages)

    @property
    def reads_prompt(self) -> bool:
        """Some pruner scores tokens by the prompt, so a sequence must hold one question."""
        return any(stage.pruner.prompt_dependent for stage in self.stages)

    def counts(self, num_tokens: int) -> list[int]:
        """Tokens that each stage retains of a row of `num_tokens`; what one that is not exact is asked to retain."""
        kept: list[int] = []
        for stage in self.stages:
            kept.append(min([stage.budget.count(num_tokens), *kept[-1:]]))
        return kept

    def layer_average(self, num_tokens: int, num_layers: int) -> float:
        """Vision tokens seen by the average decoder layer."""
        seen = [num_tokens] * num_layers
        for stage, kept in zip(self.stages, self.counts(num_tokens), strict=True):
            seen[stage.layer :] = [kept] * (num_layers - stage.layer)
        return sum(seen) / num_layers

    def to_dict(self) -> dict[str, Any]:
        """Plain values with a `version`; `from_dict` is the inverse."""
        stages = [stage.to_dict() for stage in self.stages]
        return {"version": VERSION, "positions": self.positions, "scope": self.scope, "stages": stages}

    @classmethod
    def from_dict(cls, values: dict[str, Any], allow_outside: bool = True) -> PruningPlan:
        """A plan from plain values. A mapping with `pruner` instead of `stages` is a plan of one stage.

        Args:
            values: as `to_dict` gives them.
            allow_outside: whether a pruner, or one inside another, may be the dotted path of a class elsewhere, which
                is then imported.

        Raises:
            ValueError: unknown key or version, a pruner from outside that is not allowed, or anything that
                `PruningPlan` and `Stage` refuse.
        """
        if not isinstance(values, dict):
            raise ValueError(f"A plan is a mapping with `stages`, or with `pruner` and a budget, got {values!r}.")
        values = dict(values)
        version = values.pop("version", VERSION)
        if version != VERSION:
            raise ValueError(f"This plan has version {version!r}, this tpcompress reads {VERSION}; update tpcompress.")
        if "stages" not in values:
            stage_keys = ("pruner", "layer", "keep_ratio", "keep_tokens")
            values["stages"] = [{k: values.pop(k) for k in stage_keys if k in values}]
        _no_other_keys(values, ("stages", "positions", "scope"), "plan")
        if not isinstance(values["stages"], list | tuple):
            raise ValueError(f"`stages` is a list of stages, got {values['stages']!r}; put a `-` before each in YAML.")
        stages = []
        for stage in values.pop("stages"):
            if not isinstance(stage, dict) or "pruner" not in stage:
                raise ValueError(f"A stage is a mapping with `pruner`, `layer` and a budget, got {stage!r}.")
            _no_other_keys(stage, ("pruner", "layer", "keep_ratio", "keep_tokens"), "stage")
            stages.append(Stage(**{**stage, "pruner": create(stage["pruner"], allow_outside)}))
        return cls(stages, **values)

    def to_yaml(self) -> str:
        """The plan as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_yaml(cls, text: str) -> PruningPlan:
        """The inverse of `to_yaml`; reads JSON, too."""
        return cls.from_dict(yaml.safe_load(text))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The inverse of `to_json`."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_file(cls, path: str | Path) -> PruningPlan:
        """A plan from a .yaml or .json file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"No plan file at {path}; give a YAML or JSON file with `stages`.")
        return cls.from_yaml(Path(path).read_text())


def _no_other_keys(values: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"Unknown {what} key {', '.join(map(repr, unknown))}; known: {', '.join(known)}.")
