"""The file of a study: pruners x budgets x ways to train x seeds, and ablations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tpcompress.evaluation.engine.cell import Settings, slug
from tpcompress.evaluation.engine.config import Config


@dataclass(frozen=True)
class Contender:
    """A pruner of the study.

    Attributes:
        name: name in the tables.
        pruner: name of the pruner, or `{type: name, ...arguments}`.
        layer: first decoder layer that sees fewer tokens.
        seeded: the pruner takes a `seed`, and gets that of the cell.
        recipe: settings of its runs, over the study's `recipe`.
    """

    name: str
    pruner: Any
    layer: int = 0
    seeded: bool = False
    recipe: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """A way to train with the pruner in the loop.

    Attributes:
        name: name in the tables.
        recipe: settings of its runs, over the study's `recipe` and the contender's.
    """

    name: str
    recipe: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """One change to one trained arm, at the focus budget.

    Attributes:
        name: name in the table.
        contender: name of the pruner.
        way: name of the way to train that is changed.
        recipe: changed settings of the recipe.
        pruner: changed arguments of the pruner.
    """

    name: str
    contender: str
    way: str
    recipe: Settings = field(default_factory=dict)
    pruner: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Study(Config):
    """Keys of a study file, beside those of `Config`.

    Attributes:
        recipe: `trainer`, `model` and `data` of every run; the dense control is trained with exactly this.
        contenders: the pruners.
        ways: the ways to train; the first is that of the matrices.
        budgets: tokens per image, in the order in which they are run.
        focus: budget of the cross-pruner matrix and of the ablations.
        ablations: changes to one arm.
        seeds: seeds of the runs; equal seeds see equal images in equal order.

    Raises:
        ValueError: an empty list, names that would share a file, or a name that is not in the study.
    """

    recipe: Settings
    contenders: tuple[Contender, ...]
    ways: tuple[Way, ...]
    budgets: tuple[int, ...]
    focus: int
    ablations: tuple[Ablation, ...] = ()
    seeds: tuple[int, ...] = (0,)
    out: str = field(default="runs/study", kw_only=True)

    def __post_init__(self) -> None:
        groups: dict[str, list[str]] = {
            "contenders": [c.name for c in self.contenders],
            "ways": [w.name for w in self.ways],
            "ablations": [f"{a.name} / {a.way} / {a.contender}" for a in self.ablations],
            "budgets": [str(budget) for budget in self.budgets],
            "seeds": [str(seed) for seed in self.seeds],
        }
        for what, names in groups.items():
            if not names and what != "ablations":
                raise ValueError(f"The study has no {what}; give at least one.")
            seen: dict[str, str] = {}
            for name in names:
                other = seen.setdefault(slug(name).casefold(), name)
                if names.count(name) > 1:
                    raise ValueError(f"The study's {what} have {name} twice; results are named by it.")
                if other != name:
                    raise ValueError(f"The study's {what} '{other}' and '{name}' would share files; rename one.")
        if self.focus not in self.budgets:
            raise ValueError(f"focus is {self.focus}, budgets are {self.budgets}; focus on one of them.")
        for ablation in self.ablations:
            self.contender(ablation.contender)
            self.way(ablation.way)

    @classmethod
    def parts(cls) -> dict[str, tuple[type, str | None]]:
        """The lists of pruners, ways to train and ablations."""
        return {"contenders": (Contender, None), "ways": (Way, None), "ablations": (Ablation, None)}

    def contender(self, name: str) -> Contender:
        """The pruner of that name.

        Raises:
            ValueError: there is none.
        """
        return _named(self.contenders, name, "contender")

    def way(self, name: str) -> Way:
        """The way to train of that name.

        Raises:
            ValueError: there is none.
        """
        return _named(self.ways, name, "way")


def _named(things: tuple[Any, ...], name: str, what: str) -> Any:
    found = next((thing for thing in things if thing.name == name), None)
    if found is None:
        known = ", ".join(thing.name for thing in things)
        raise ValueError(f"The study has no {what} '{name}'; it has {known}.")
    return found
