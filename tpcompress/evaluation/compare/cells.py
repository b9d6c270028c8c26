"""The cells of a comparison, in the order of the table, and what each measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcompress.data.collate import BatchMeta
from tpcompress.evaluation.compare.config import Comparison
from tpcompress.evaluation.compare.oracle import oracle_plan
from tpcompress.evaluation.downsample import CannotDownsample, downsampled
from tpcompress.evaluation.engine.bench import Bench
from tpcompress.evaluation.engine.cell import Cell, Made, Run, Settings, slug
from tpcompress.evaluation.engine.counts import Counted, mean_vision_tokens
from tpcompress.evaluation.engine.model_cell import ModelCell
from tpcompress.evaluation.engine.plans import budget_of, control_plan, key_of, recipe_plan
from tpcompress.evaluation.position_bias import PositionBias
from tpcompress.evaluation.scoring.degrade import degrade
from tpcompress.evaluation.tasks import Task
from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, detach
from tpcompress.insertion.plan import Budget, PruningPlan
from tpcompress.insertion.trace import Trace
from tpcompress.recipe_files import read_recipe


@dataclass(frozen=True, eq=False)
class RowCell(ModelCell):
    """A model with the number and the positions of the tokens that it retains. Labels: the identity of its `Row`."""

    def map_path(self, bench: Bench) -> Path:
        """File of the retention map."""
        return bench.folder / "position_bias" / f"{self.name}.npz"

    def make(self, bench: Bench) -> Made:
        """Test the model and record what it retains."""
        bias, counted = PositionBias(), Counted()

        def watch(trace: Trace, meta: BatchMeta) -> None:
            bias.add(trace, meta.rows)
            counted.add(trace)

        total, depth = bench.vision_tokens, len(resolve(bench.model).layers)
        with self.model(bench) as model:
            scores = bench.test(model, self.blank, watch)
        retained, average = (total, total) if self.plan is None else counted.means(depth)
        record: dict[str, Any] = {"vision_tokens": total, "retained_tokens": retained, "layer_average": average}
        maps = bias.maps()
        if maps:
            maps[-1].save(self.map_path(bench))
            for name, index in (("uniformity", maps[-1].places), ("uniformity_thirds", maps[-1].thirds)):
                record |= {name: _number(index.value), f"{name}_ci95": _number(index.ci95)}
        return Made(record, scores)


@dataclass(frozen=True, eq=False)
class DownsampleCell(Cell):
    """The base on smaller images, without a pruner.

    Attributes:
        budget: tokens or share of tokens of an image.
    """

    budget: Budget = Budget(keep_tokens=1)

    def key(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Shared settings and the budget."""
        return {**common, "downsample": str(self.budget)}

    def make(self, bench: Bench) -> Made:
        """Test the base on smaller images; a family whose images cannot be made smaller gets a note instead."""
        total = bench.vision_tokens
        try:
            with downsampled(bench.model, bench.processor, max(1, self.budget.count(round(total)))) as smaller:
                data = bench.collated(smaller.processor)
                scores = bench.task.score(bench.model, smaller.processor, data, metric=bench.metric)
                count = mean_vision_tokens(bench.model, data.batches)
        except CannotDownsample as error:
            return Made({"vision_tokens": total, "note": f"not available: {error}", "summary": str(error)})
        assert count is not None
        grid = "" if smaller.grid is None else f", {smaller.grid[0]} x {smaller.grid[1]}"
        note = f"{count:g} tokens{grid}, of images with fewer pixels"
        record = {"vision_tokens": total, "retained_tokens": count, "layer_average": count, "note": note}
        return Made(record, scores)


@dataclass(frozen=True, eq=False)
class DegradedCell(Cell):
    """The base on images without detail, for the hard subset; not a row of the table.

    Attributes:
        factor: by which the sides are shrunk before they are enlarged again.
        variant: 0 or 1, see `scoring.degrade`.
    """

    factor: float = 4.0
    variant: int = 0

    def key(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Shared settings, factor and variant."""
        return {**common, "degraded": [self.factor, self.variant]}

    def make(self, bench: Bench) -> Made:
        """Test the base."""
        data = bench.collated(bench.processor, degrade(self.factor, self.variant))
        return Made(scores=bench.task.score(bench.model, bench.processor, data, metric=bench.metric))


@dataclass(frozen=True, eq=False)
class OracleCell(Cell):
    """The base with the tokens that each question rests on, and random others up to the budget.

    Attributes:
        budget: tokens or share of tokens of an image.
    """

    budget: Budget = Budget(keep_tokens=1)

    def key(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Shared settings and the budget."""
        return {**common, "oracle": str(self.budget)}

    def make(self, bench: Bench) -> Made:
        """Test the base, one question per sequence; collated on the way, since images repeat with every question."""
        plan, counted = oracle_plan(bench.task, self.budget), Counted()
        attach(bench.model, plan)
        try:
            watch = lambda trace, _: counted.add(trace)  # noqa: E731
            scores = bench.task.score(bench.model, bench.processor, metric=bench.metric, watch=watch)
        finally:
            detach(bench.model)
        retained, average = counted.means(len(resolve(bench.model).layers))
        leaks = ", ".join(bench.task.evidence_leaks)
        note = f"in {leaks}, it knows the answer" if leaks else ""
        record = {"vision_tokens": bench.vision_tokens, "retained_tokens": retained, "layer_average": average}
        return Made(record | {"note": note}, scores)


def cells_of(comparison: Comparison) -> list[Cell]:
    """All cells: dense, blank baseline, smaller images, training-free, control, training-aware.

    Raises:
        FileNotFoundError, ValueError: a recipe is missing or has no plan of one stage, or two recipes would share rows.
    """
    trained = comparison.trained()
    cells: list[Cell] = [_row("dense"), _row("blind", blank=True)]
    if comparison.hard_subset:
        labels = {"arm": "degraded", "pruner": None}
        cells += [DegradedCell(f"degraded-{n}", labels, comparison.hard_subset, n) for n in (0, 1)]
    if comparison.downsample:  # early: quick, and it says whether the family has smaller images
        for value in comparison.budgets:
            cells.append(DownsampleCell(*_identity("downsample", None, 0, value, 0), budget_of(value)))
    shared = [(p, value) for value in comparison.budgets for p in comparison.training_free if not p.budgets]
    own = [(p, value) for p in comparison.training_free for value in p.budgets]
    for pruner, value in shared + own:
        for seed in pruner.seeds or (None,):
            cells.append(_row("training_free", pruner.plan(budget_of(value), seed), seed or 0, label=pruner.name))
    if type(comparison.make_task()).evidence is not Task.evidence:
        for value in dict.fromkeys([*comparison.budgets, *(v for p in comparison.training_free for v in p.budgets)]):
            if value:
                cells.append(OracleCell(*_identity("oracle", None, 0, value, 0), budget_of(value)))
    if comparison.control:
        run = Run("dense-seed0", _read_recipe(comparison.control), None, 0)
        plans = [control_plan(recipe_plan(entry.recipe, budget)) for entry, budget in trained]
        cells.append(_row("dense_ft", run=run))
        cells += {cell.name: cell for plan in plans if plan and (cell := _row("dense_ft", plan, run=run))}.values()
    for entry, budget in trained:
        plan, recipe = recipe_plan(entry.recipe, budget), _read_recipe(entry.recipe)
        name, layer, keep = key_of(plan)
        for seed in entry.seeds:
            run = Run(slug(f"{name}-l{layer}-{keep}-seed{seed}"), recipe, plan, seed)
            cells.append(_row("training_aware", plan, seed, run=run, gate=run))
    return cells


def _row(
    arm: str,
    plan: PruningPlan | None = None,
    seed: int = 0,
    run: Run | None = None,
    gate: Run | None = None,
    label: str | None = None,
    blank: bool = False,
) -> RowCell:
    pruner, layer, keep = key_of(plan)
    return RowCell(*_identity(arm, label or pruner, layer, keep, seed), plan, run, gate, blank)


def _identity(arm: str, pruner: str | None, layer: int, keep: float | None, seed: int) -> tuple[str, dict[str, Any]]:
    """File name and labels of a row."""
    name = slug(f"{arm}-{pruner or 'dense'}-l{layer}-{'all' if keep is None else keep}-seed{seed}")
    return name, {"arm": arm, "pruner": pruner, "keep_tokens": keep, "layer": layer, "seed": seed}


def _read_recipe(path: str) -> Settings:
    """The content of a recipe.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a mapping.
    """
    recipe = read_recipe(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a recipe; a recipe is a mapping with model, data and trainer.")
    return recipe


def _number(value: float) -> float | None:
    return None if value != value else float(value)
