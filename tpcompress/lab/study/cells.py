"""The cells of a study: which model each needs, what it is tested with, and in which order they come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tpcompress.evaluation.engine.plans import control_plan
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.lab.study.config import Ablation, Contender, Settings, Study, Way
from tpcompress.pruners import create

FREE = "training-free"
CONTROL = "dense control"
DENSE = "dense"
TABLES = ("base", "grid", "budgets", "pruners", "ablations")


@dataclass(frozen=True, eq=False)
class Training:
    """A run.

    Attributes:
        name: its folder.
        recipe: complete; no run depends on anything else.
        plan: in its loop; None trains the dense model.
        seed: of everything drawn.
    """

    name: str
    recipe: Settings
    plan: PruningPlan | None
    seed: int

    @property
    def made_of(self) -> str:
        """Recipe and plan as text, to be told from another run of the same name."""
        plan = None if self.plan is None else self.plan.to_dict()
        return json.dumps({"recipe": self.recipe, "plan": plan}, sort_keys=True)


@dataclass(frozen=True, eq=False)
class Cell:
    """One model, tested once.

    Attributes:
        name: its file.
        table: one of `TABLES`.
        pruner: contender that it was trained with, or that is tested where nothing was trained with one.
        way: how it was trained.
        budget: tokens it was trained with; None without a plan.
        seed: of the run.
        tested: contender it is tested with; None tests without pruning.
        tested_budget: tokens it is tested with; None for all.
        training: its run; None is the base as it is.
        gate: run that the tested pruner's weights come from, where it has weights.
        plan: of the test; None tests without pruning.
        blank: images are blanked.
    """

    name: str
    table: str
    pruner: str
    way: str
    budget: int | None
    seed: int
    tested: str | None
    tested_budget: int | None
    training: Training | None = None
    gate: Training | None = None
    plan: PruningPlan | None = None
    blank: bool = False


def cells_of(study: Study) -> list[Cell]:
    """All cells: the grid seed by seed; then, again seed by seed, what is tested otherwise than trained, and ablations.

    So a study that is stopped early has few seeds in its later tables rather than no table.
    """
    cells = [
        Cell("base-dense", "base", DENSE, FREE, None, 0, None, None),
        Cell("base-blind", "base", DENSE, "blind", None, 0, None, None, blank=True),
    ]
    for seed in study.seeds:
        cells += _grid(study, seed)
    for seed in study.seeds:
        cells += [*_budgets(study, seed), *_pruners(study, seed)]
        cells += [_ablated(study, ablation, seed) for ablation in study.ablations]
    return cells


def training_of(study: Study, contender: Contender | None, way: Way | None, budget: int | None, seed: int) -> Training:
    """A run of the grid; without contender the dense control."""
    if contender is None or way is None:
        return Training(f"dense-seed{seed}", study.recipe, None, seed)
    recipe = merged(merged(study.recipe, contender.recipe), way.recipe)
    name = slug(f"{way.name}-{contender.name}-{budget}-seed{seed}")
    return Training(name, recipe, plan_for(contender, budget, seed), seed)


def plan_for(contender: Contender, budget: int | None, seed: int) -> PruningPlan:
    """The plan of a contender at a budget."""
    config: Any = create(contender.pruner).config()
    if contender.seeded:
        config["seed"] = seed
    return PruningPlan([Stage(config, contender.layer, keep_tokens=budget)])


def runs_of(cell: Cell) -> list[Training]:
    """The runs that a cell needs, each once."""
    return list({t.name: t for t in (cell.training, cell.gate) if t is not None}.values())


def merged(below: Settings, above: Settings) -> Settings:
    """`above` over `below`, mapping by mapping; whatever names its class replaces what was there."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        plain = isinstance(value, dict) and isinstance(old, dict) and "class_path" not in value
        result[key] = merged(old, value) if plain and old is not None else value
    return result


def slug(text: str) -> str:
    """A file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def fingerprint(study: Study) -> str:
    """What must not change while a folder fills, besides the runs themselves: the base and the data of the tests."""
    same = {name: getattr(study, name) for name in ("base", "num_images", "seed")}
    return json.dumps(same, sort_keys=True)


# ---------------------------------------------------------------------------------------------------- tables


def _grid(study: Study, seed: int) -> Iterator[Cell]:
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


def _budgets(study: Study, seed: int) -> Iterator[Cell]:
    """Trained at one budget, tested at the others and without pruning."""
    for contender in study.contenders:
        for budget in study.budgets:
            for other in (*study.budgets, None):
                if other != budget:
                    tested = None if other is None else contender
                    yield _cell(study, "budgets", contender, study.ways[0], budget, seed, tested, other)


def _pruners(study: Study, seed: int) -> Iterator[Cell]:
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
) -> Cell:
    """A cell whose run is one of the grid."""
    training = None if free else training_of(study, contender if way else None, way, budget, seed)
    plan = gate = None
    if tested is not None:
        plan = plan_for(tested, tested_budget, seed)
        if plan.stages[-1].pruner.learned and way is None:
            plan = control_plan(plan)  # what a learned pruner starts as stands in for it where none was trained
        elif plan.stages[-1].pruner.learned:
            own = tested is contender
            gate = training if own else training_of(study, tested, study.ways[0], tested_budget, seed)
    label = FREE if free else CONTROL if way is None else way.name
    name = contender.name if contender is not None else DENSE
    what = f"{table}-{label}-{name}-{budget or 'none'}-to-{tested.name if tested else DENSE}-{tested_budget or 'all'}"
    return Cell(
        slug(f"{what}-seed{seed}"), table, name, label, budget, seed, tested.name if tested else None, tested_budget,
        training, gate, plan,
    )  # fmt: skip


def _ablated(study: Study, ablation: Ablation, seed: int) -> Cell:
    """One change to an arm of the grid; tested as it was trained."""
    contender, way = study.contender(ablation.contender), study.way(ablation.way)
    config = create(contender.pruner).config() | ablation.pruner
    changed = Contender(contender.name, config, contender.layer, contender.seeded)
    recipe = merged(merged(merged(study.recipe, contender.recipe), way.recipe), ablation.recipe)
    name = slug(f"ablation-{ablation.name}-{way.name}-{contender.name}-{study.focus}-seed{seed}")
    plan = plan_for(changed, study.focus, seed)
    training = Training(name, recipe, plan, seed)
    gate = training if plan.stages[-1].pruner.learned else None
    label, budget = f"{way.name}: {ablation.name}", study.focus
    return Cell(name, "ablations", contender.name, label, budget, seed, contender.name, budget, training, gate, plan)
