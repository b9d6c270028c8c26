"""The comparison: dense, control, training-free and training-aware rows from one file, resumable row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.run import Run
from tpcompress.evaluation.engine.config import keys_of, read_settings
from tpcompress.evaluation.engine.plans import budget_of, key_of, recipe_plan
from tpcompress.insertion.plan import Budget


@dataclass(frozen=True)
class FreeArm:
    """A pruner that runs without training.

    Attributes:
        pruner: its name, or `{type: name, ...arguments}`.
        layer: first decoder layer that sees fewer tokens.
        budgets: budgets to run it at; default: the comparison's. 0 is for a pruner that withdraws (vtw).
        seeds: one row per seed, for pruners that take one.
        label: name of its rows, where a pruner runs with several sets of arguments; default: the pruner's.
    """

    pruner: Any
    layer: int = 0
    budgets: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    label: str | None = None

    @property
    def name(self) -> str:
        """What stands in the table."""
        return self.label or str(self.pruner["type"] if isinstance(self.pruner, dict) else self.pruner)


@dataclass(frozen=True)
class AwareArm:
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
class Comparison:
    """What a comparison file says.

    Attributes:
        base: the model all rows start from.
        out: folder of the results.
        budgets: whole numbers are tokens per image, fractions are keep ratios.
        training_free: `FreeArm`s; a bare name is one at layer 0.
        training_aware: `AwareArm`s; a bare path is one at the first budget.
        control: recipe of the dense model with the same extra steps.
        downsample: the base on smaller pictures at every budget, without a pruner.
        num_images: held-out images of the benchmark's test split.
        seed: of the benchmark's pictures and of the bootstrap.
        batch_size: images per evaluation batch.
    """

    base: str = "tiny_llava"
    out: str = "runs/compare"
    budgets: tuple[float, ...] = (16,)
    training_free: tuple[FreeArm, ...] = ()
    training_aware: tuple[AwareArm, ...] = ()
    control: str | None = None
    downsample: bool = False
    num_images: int = 1024
    seed: int = 0
    batch_size: int = 64

    @classmethod
    def from_file(cls, path: str) -> Comparison:
        """Read a comparison file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: unknown or malformed key.
        """
        values = read_settings(path, "base, budgets, training_free")
        free = [a if isinstance(a, dict) and "pruner" in a else {"pruner": a} for a in values.pop("training_free", [])]
        aware = [a if isinstance(a, dict) else {"recipe": a} for a in values.pop("training_aware", [])]
        with keys_of(cls, path):
            comparison = cls(
                training_free=tuple(FreeArm(**a) for a in free),
                training_aware=tuple(AwareArm(**a) for a in aware),
                **values,
            )
        rows = [(arm.name, arm.layer, value) for arm in comparison.training_free for value in arm.budgets or (None,)]
        twice = next((row for row in rows if rows.count(row) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}: two training-free rows are named {twice[0]} at layer {twice[1]}; give a label.")
        if not comparison.budgets:
            raise ValueError(f"{path}: budgets is empty; give counts such as 16 or ratios such as 0.111.")
        if any(aware.seeds and len(set(aware.seeds)) < len(aware.seeds) for aware in comparison.training_aware):
            raise ValueError(f"{path}: a recipe lists the same seed twice.")
        return comparison


def run_comparison(config: str | Comparison, out: str | Path | None, console: Console) -> Report:
    """Run every row that is not in the folder's report yet, then print the table and write report and figures.

    Args:
        config: a comparison, or its file.
        out: folder of the results; default: the comparison's.
        console: where progress and table go.
    """
    comparison = Comparison.from_file(config) if isinstance(config, str) else config
    run = start(comparison, out, console)
    run_arms(comparison, run)
    return run.finish()


def start(comparison: Comparison, out: str | Path | None, console: Console) -> Run:
    """Load base, data and the rows that an earlier attempt left."""
    settings = (comparison.base, comparison.num_images, comparison.seed, comparison.batch_size)
    return Run.begin(Path(out or comparison.out), console, *settings)


def run_arms(comparison: Comparison, run: Run) -> None:
    """All rows of a comparison, in the order of the table.

    Raises:
        ValueError: two recipes would share their rows.
    """
    trained = [(a, budget_of(v)) for a in comparison.training_aware for v in a.budgets or comparison.budgets[:1]]
    _check_told_apart(trained)
    run.dense()
    for value in comparison.budgets if comparison.downsample else ():
        run.downsampled(budget_of(value))  # early: a family that cannot do it says so before hours of other rows
    shared = [(arm, value) for value in comparison.budgets for arm in comparison.training_free if not arm.budgets]
    own = [(arm, value) for arm in comparison.training_free for value in arm.budgets]
    for arm, value in shared + own:
        for seed in arm.seeds or (None,):
            run.training_free(arm.pruner, arm.layer, budget_of(value), seed, arm.name)
    if comparison.control:
        run.control(comparison.control, [(aware.recipe, budget) for aware, budget in trained])
    for aware, budget in trained:
        for seed in aware.seeds:
            run.training_aware(aware.recipe, budget, seed)


def _check_told_apart(trained: Sequence[tuple[AwareArm, Budget]]) -> None:
    """See that no two recipes train the same pruner at the same budget: rows and runs are named by these."""
    seen: dict[tuple[str | None, int, float | None], str] = {}
    for arm, budget in trained:
        key = key_of(recipe_plan(arm.recipe, budget))
        if seen.setdefault(key, arm.recipe) != arm.recipe:
            raise ValueError(
                f"{seen[key]} and {arm.recipe} both train {key[0]} at {key[2]}; compare them in two files, each with "
                f"its own out."
            )
