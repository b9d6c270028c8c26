"""A study: pruners x budgets x ways to train x seeds from one file, in cells that many processes may share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from tpcompress.evaluation.engine.config import keys_of, read_settings

Settings = dict[str, Any]
"""Part of a recipe."""


@dataclass(frozen=True)
class Contender:
    """A pruner of the study.

    Attributes:
        name: what stands in the tables.
        pruner: its name, or `{type: name, ...arguments}`.
        layer: first decoder layer that sees fewer tokens.
        seeded: the pruner takes a `seed`, and gets the cell's.
        recipe: what its runs have beside the study's `recipe`.
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
        name: what stands in the tables.
        recipe: what its runs have beside the study's `recipe` and the contender's.
    """

    name: str
    recipe: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """One change to one trained arm, at the focus budget.

    Attributes:
        name: what stands in the table.
        contender: name of the pruner.
        way: name of the way to train that is changed.
        recipe: the change.
        pruner: arguments of the pruner that change.
    """

    name: str
    contender: str
    way: str
    recipe: Settings = field(default_factory=dict)
    pruner: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Attributes:
        recipe: `trainer`, `model` and `data` of every run; the dense control is trained with exactly this.
        contenders: the pruners.
        ways: the ways to train; the first is that of the matrices.
        budgets: tokens per image, in the order in which they are run.
        focus: the budget of the cross-pruner matrix and of the ablations.
        ablations: changes to one arm.
        seeds: of the runs; equal seeds see equal pictures in equal order.
        base: the model all rows start from.
        out: folder of the results.
        num_images: held-out images of the benchmark's test split.
        seed: of those pictures and of the bootstrap.
        batch_size: sequences per evaluation batch.
    """

    recipe: Settings
    contenders: tuple[Contender, ...]
    ways: tuple[Way, ...]
    budgets: tuple[int, ...]
    focus: int
    ablations: tuple[Ablation, ...] = ()
    seeds: tuple[int, ...] = (0,)
    base: str = "tiny_llava"
    out: str = "runs/study"
    num_images: int = 320
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        groups: tuple[tuple[str, list[Any]], ...] = (
            ("contenders", [c.name for c in self.contenders]),
            ("ways", [w.name for w in self.ways]),
            ("ablations", [(a.name, a.contender, a.way) for a in self.ablations]),
            ("budgets", list(self.budgets)),
            ("seeds", list(self.seeds)),
        )
        for what, names in groups:
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"The study's {what} have {twice} twice; cells are told apart by it.")
            if not names and what != "ablations":
                raise ValueError(f"The study has no {what}; give at least one.")
        if self.focus not in self.budgets:
            raise ValueError(f"focus is {self.focus}, budgets are {self.budgets}; focus on one of them.")
        for ablation in self.ablations:
            self.contender(ablation.contender)
            self.way(ablation.way)

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

    @classmethod
    def from_file(cls, path: str) -> Study:
        """Read a study file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: unknown or malformed key.
        """
        values = read_settings(path, "recipe, contenders, ways, budgets")
        kinds: dict[str, Any] = {"contenders": Contender, "ways": Way, "ablations": Ablation}
        with keys_of(cls, path):
            groups = {key: tuple(kind(**v) for v in values.get(key) or ()) for key, kind in kinds.items()}
            lists = {key: tuple(values[key]) for key in ("budgets", "seeds") if key in values}
            return cls(**(values | groups | lists))


def run_study(
    config: str | Study, out: str | Path | None, console: Console, tables: bool = False, into: str | Path | None = None
) -> Path:
    """Make every cell that the folder lacks, then the tables; other processes may work on the same folder.

    Args:
        config: a study, or its file.
        out: folder of the results; default: the study's.
        console: where progress goes.
        tables: only make the tables of what is there.
        into: a document whose tables, between its two markers, are made anew.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds another study, or the document has no markers.
    """
    from tpcompress.lab.study.cells import cells_of
    from tpcompress.lab.study.run import Workshop
    from tpcompress.lab.study.tables import write_tables

    study = Study.from_file(config) if isinstance(config, str) else config
    folder = Path(out or study.out)
    cells = cells_of(study)
    if not tables:
        start = time.perf_counter()
        made = Workshop.open(study, folder, console).work(cells)
        console.print(f"{made} cells in {(time.perf_counter() - start) / 60:.0f} min", highlight=False)
    write_tables(study, cells, folder, into)
    console.print(f"[bold]{folder}[/bold]: tables.md, tables.csv, tables.json", soft_wrap=True)
    return folder


def _named(things: tuple[Any, ...], name: str, what: str) -> Any:
    found = next((thing for thing in things if thing.name == name), None)
    if found is None:
        known = ", ".join(thing.name for thing in things)
        raise ValueError(f"The study has no {what} '{name}'; it has {known}.")
    return found
