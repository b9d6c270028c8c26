"""The cells of a study: the model and the test of each, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tpcompress.evaluation.engine.cell import Run, Settings, slug
from tpcompress.evaluation.engine.model_cell import ModelCell
from tpcompress.evaluation.engine.plans import control_plan, one_stage
from tpcompress.insertion.plan import Budget, PruningPlan
from tpcompress.lab.study.config import Ablation, Contender, Study, Way
from tpcompress.pruners import create

FREE = "training-free"
CONTROL = "dense control"
DENSE = "dense"
TABLES = ("base", "grid", "budgets", "pruners", "ablations")


@dataclass(frozen=True, eq=False)
class StudyCell(ModelCell):
    """One model, tested once. Labels of a cell:

    * `table`: one of `TABLES`.
    * `pruner`: contender in training; where nothing was trained with one, the contender of the test.
    * `way`: how the model was trained.
    * `budget`: tokens in training; None without a plan.
    * `seed`: seed of the run.
    * `tested`: contender of the test; None tests without pruning.
    * `tested_budget`: tokens in the test; None for all.
    """

    @property
    def setting(self) -> tuple[Any, ...]:
        """All labels but the seed: equal in the cells that a table averages."""
        return tuple(value for name, value in self.labels.items() if name != "seed")


def cells_of(study: Study) -> list[StudyCell]:
    """All cells: the grid seed by seed; then, again seed by seed, tests under other settings and ablations.

    So a study that is stopped early has few seeds in its later tables rather than no table.
    """
    cells = [
        StudyCell("base-dense", _labels("base", DENSE, FREE, None, 0, None, None)),
        StudyCell("base-blind", _labels("base", DENSE, "blind", None, 0, None, None), blank=True),
    ]
    for seed in study.seeds:
        cells += _grid(study, seed)
    for seed in study.seeds:
        cells += [*_budgets(study, seed), *_pruners(study, seed)]
        cells += [_ablated(study, ablation, seed) for ablation in study.ablations]
    return cells


def run_of(study: Study, contender: Contender | None, way: Way | None, budget: int | None, seed: int) -> Run:
    """A run of the grid; without contender the dense control."""
    if contender is None or way is None:
        return Run(f"dense-seed{seed}", study.recipe, None, seed)
    recipe = merged(merged(study.recipe, contender.recipe), way.recipe)
    name = slug(f"{way.name}-{contender.name}-{budget}-seed{seed}")
    return Run(name, recipe, plan_for(contender, budget, seed), seed)


def plan_for(contender: Contender, budget: int | None, seed: int) -> PruningPlan:
    """The plan of a contender at a budget."""
    config = create(contender.pruner).config()
    return one_stage(config, contender.layer, Budget(keep_tokens=budget), seed if contender.seeded else None)


def merged(below: Settings, above: Settings) -> Settings:
    """`above` over `below`, mapping by mapping; a mapping with a `class_path` replaces what was there."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        plain = isinstance(value, dict) and isinstance(old, dict) and "class_path" not in value
        result[key] = merged(old, value) if plain and old is not None else value
    return result


# ---------------------------------------------------------------------------------------------------- tables


def _grid(study: Study, seed: int) -> Iterator[StudyCell]:
    """Training-free (once, where no seed can make a difference), control, and every way to train."""
    yield _cell(study, "grid", None, None, None, seed, None, None)
    for budget in study.budgets:
        for contender in study.contenders:
            if contender.seeded or seed == study.seeds[0]:
                yield _cell(study, "grid", contender, None, None, seed, contender, budget, free=True)
    for budget in study.budgets:
        for contender in study.contenders:
            yield _cell(study, "grid", contender, None, None, seed, contender, budget)
            for way in study.ways:
                yield _cell(study, "grid", contender, way, budget, seed, contender, budget)


def _budgets(study: Study, seed: int) -> Iterator[StudyCell]:
    """Trained at one budget, tested at the others and without pruning."""
    for contender in study.contenders:
        for budget in study.budgets:
            for other in (*study.budgets, None):
                if other != budget:
                    tested = None if other is None else contender
                    yield _cell(study, "budgets", contender, study.ways[0], budget, seed, tested, other)


def _pruners(study: Study, seed: int) -> Iterator[StudyCell]:
    """Trained with one pruner, tested with the others."""
    for contender in study.contenders:
        for tested in study.contenders:
            if tested is not contender:
                yield _cell(study, "pruners", contender, study.ways[0], study.focus, seed, tested, study.focus)


def _cell(
    study: Study,
    table: str,
    contender: Contender | None,
    way: Way | None,
    budget: int | None,
    seed: int,
    tested: Contender | None,
    tested_budget: int | None,
    free: bool = False,
) -> StudyCell:
    """A cell whose run is one of the grid."""
    run = None if free else run_of(study, contender if way else None, way, budget, seed)
    plan = gate = None
    if tested is not None:
        plan = plan_for(tested, tested_budget, seed)
        if plan.stages[-1].pruner.learned and way is None:
            plan = control_plan(plan)  # where no pruner was trained, its untrained equivalent takes its place
        elif plan.stages[-1].pruner.learned:
            own = tested is contender
            gate = run if own else run_of(study, tested, study.ways[0], tested_budget, seed)
    label = FREE if free else CONTROL if way is None else way.name
    name = contender.name if contender is not None else DENSE
    what = f"{table}-{label}-{name}-{budget or 'none'}-to-{tested.name if tested else DENSE}-{tested_budget or 'all'}"
    labels = _labels(table, name, label, budget, seed, tested.name if tested else None, tested_budget)
    return StudyCell(slug(f"{what}-seed{seed}"), labels, plan, run, gate)


def _ablated(study: Study, ablation: Ablation, seed: int) -> StudyCell:
    """One change to an arm of the grid; tested as it was trained."""
    contender, way = study.contender(ablation.contender), study.way(ablation.way)
    config = create(contender.pruner).config() | ablation.pruner
    changed = Contender(contender.name, config, contender.layer, contender.seeded)
    recipe = merged(merged(merged(study.recipe, contender.recipe), way.recipe), ablation.recipe)
    name = slug(f"ablation-{ablation.name}-{way.name}-{contender.name}-{study.focus}-seed{seed}")
    plan = plan_for(changed, study.focus, seed)
    run = Run(name, recipe, plan, seed)
    label = f"{way.name}: {ablation.name}"
    labels = _labels("ablations", contender.name, label, study.focus, seed, contender.name, study.focus)
    return StudyCell(name, labels, plan, run, run if plan.stages[-1].pruner.learned else None)


def _labels(
    table: str, pruner: str, way: str, budget: int | None, seed: int, tested: str | None, tested_budget: int | None
) -> dict[str, Any]:
    return {
        "table": table, "pruner": pruner, "way": way, "budget": budget, "seed": seed, "tested": tested,
        "tested_budget": tested_budget,
    }  # fmt: skip
