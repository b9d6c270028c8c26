"""The file of a comparison: pruners to run without training, recipes to train, and their control."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from tpcompress.bundled import find_config
from tpcompress.evaluation.compare.imported import check_entry
from tpcompress.evaluation.engine.cell import slug
from tpcompress.evaluation.engine.config import Config
from tpcompress.evaluation.engine.plans import FreePruner, budget_of, key_of, recipe_plan
from tpcompress.insertion.plan import Budget


@dataclass(frozen=True)
class TrainedRecipe:
    """A recipe to train with its pruner in the loop.

    Attributes:
        recipe: the recipe file.
        budgets: budgets to train it at; default: the comparison's first.
        seeds: one run per seed.
    """

    recipe: str
    budgets: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Comparison(Config):
    """Keys of a comparison file, beside those of `Config`.

    Attributes:
        budgets: whole numbers are tokens per image, fractions are keep ratios.
        training_free: pruners without training; a bare name is one at layer 0.
        training_aware: recipes to train; a bare path is one at the first budget.
        control: recipe of the dense model with the same extra steps.
        downsample: add the base on smaller images at every budget, without a pruner.
        hard_subset: factor by which images lose detail (such as 4) for the questions that need it; None leaves the
            hard subset out.
        tasks: several tasks instead of one, each a name or `{type: name, metric: ..., label: ...}`.
        results: result files of other harnesses, each `{lmms_eval: FILE}` or `{vlmevalkit: FILE}` with `metrics`, and
            `arm`, `pruner`, `keep_tokens`, `layer`, `seed` or `label` where the file does not tell the model. A file
            with nothing but `results` and `out` tests no model.

    Raises:
        ValueError: no budget, a seed twice, or rows that cannot be told apart.
    """

    out: str = "runs/compare"
    num_images: int = 1024
    budgets: tuple[float, ...] = (16,)
    training_free: tuple[FreePruner, ...] = ()
    training_aware: tuple[TrainedRecipe, ...] = ()
    control: str | None = None
    downsample: bool = False
    hard_subset: float | None = None
    tasks: tuple[Any, ...] = ()
    results: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        for entry in self.results:
            check_entry(entry)
        if self.hard_subset is not None and not self.hard_subset > 1:
            raise ValueError(f"hard_subset is a factor above 1, such as 4, got {self.hard_subset}.")
        if self.tasks and (self.data is not None or self.task != "benchmark" or self.metric or self.generate):
            raise ValueError("tasks stands beside task, data, metric or generate; write these inside its entries.")
        if not self.budgets:
            raise ValueError("budgets is empty; give counts such as 16 or ratios such as 0.111.")
        groups: dict[str, tuple[float, ...]] = {"budgets": self.budgets}
        for free in self.training_free:
            groups |= {f"budgets of {free.name}": free.budgets, f"seeds of {free.name}": free.seeds}
        for trained in self.training_aware:
            groups |= {f"budgets of {trained.recipe}": trained.budgets, f"seeds of {trained.recipe}": trained.seeds}
        for what, values in groups.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{what}: the same value is listed twice.")
        rows = Counter((slug(p.name).casefold(), p.layer, value) for p in self.training_free for value in self.at(p))
        twice = next((row for row, number in rows.items() if number > 1), None)
        if twice is not None:
            raise ValueError(f"two training-free rows are named {twice[0]} at layer {twice[1]}; give one a label.")

    @classmethod
    def parts(cls) -> dict[str, tuple[type, str | None]]:
        """The lists of pruners and recipes."""
        return {"training_free": (FreePruner, "pruner"), "training_aware": (TrainedRecipe, "recipe")}

    @property
    def only_results(self) -> bool:
        """There are results of other harnesses, and nothing of ours to test."""
        asked = (self.training_free, self.training_aware, self.control, self.tasks, self.data, self.downsample)
        return bool(self.results) and not any(asked) and self.task == "benchmark"

    def check_tasks(self) -> None:
        """Make every task, without reading its data."""
        if not self.tasks:
            super().check_tasks()
        for one in self.by_task().values():
            one.check_tasks()

    def by_task(self) -> dict[str, Comparison]:
        """One comparison per entry of `tasks`, by the label of the task.

        Raises:
            ValueError: a wrong task, or two of one label.
        """
        found: dict[str, Comparison] = {}
        for entry in self.tasks:
            one = replace(self, tasks=(), results=(), task=entry)
            name = slug(one.make_task().title)
            if name.casefold() in map(str.casefold, found):
                raise ValueError(f"two tasks are named {name}; give one a label.")
            found[name] = one
        return found

    def at(self, pruner: FreePruner) -> tuple[float, ...]:
        """Budgets of a pruner."""
        return pruner.budgets or self.budgets

    def trained(self) -> list[tuple[TrainedRecipe, Budget]]:
        """Every recipe with every budget that it is trained at.

        Raises:
            ValueError: two recipes train the same pruner at the same budget, by which rows and runs are named.
        """
        found = [(a, budget_of(v)) for a in self.training_aware for v in a.budgets or self.budgets[:1]]
        seen: dict[tuple[str | None, int, float | None], str] = {}
        for entry, budget in found:
            key = key_of(recipe_plan(find_config(entry.recipe), budget))
            if seen.setdefault(key, entry.recipe) != entry.recipe:
                raise ValueError(
                    f"{seen[key]} and {entry.recipe} both train {key[0]} at {key[2]}; compare them in two files, each "
                    f"with its own out."
                )
        return found
