"""Budgets over a phase."""

import importlib
import pkgutil

import pytest

from tpcompress.insertion.plan import Budget
from tpcompress.training import schedules
from tpcompress.training.schedules import (
    Constant,
    Cosine,
    EpicWindow,
    LayerRamp,
    Linear,
    Matryoshka,
    RandomBudget,
    Sandwich,
    Schedule,
    Steps,
    draw_for,
    list_schedules,
    progress_at,
)  # fmt: skip

RATIO, COUNT = Budget(keep_ratio=0.25), Budget(keep_tokens=16)


def run(schedule: Schedule, budget: Budget, steps: int) -> list[float]:
    values = [schedule.budget(budget, progress_at(i, steps), 0.5) for i in range(steps)]
    return [v.keep_tokens if v.keep_ratio is None else v.keep_ratio for v in values]


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("schedule", [Constant(), Linear(), Linear(9, 1.0), Cosine(), Cosine(3, 1.0), Linear(1e6, 0.3)])
def test_schedules_fall_to_the_budget_of_the_plan(schedule, steps):
    counts, ratios = run(schedule, COUNT, steps), run(schedule, RATIO, steps)
    assert counts[-1] == 16
    assert ratios[-1] == 0.25
    assert counts == sorted(counts, reverse=True)
    assert ratios == sorted(ratios, reverse=True)
    assert all(isinstance(value, int) and value >= 16 for value in counts)
    assert all(0.25 <= value <= 1 for value in ratios)


def test_where_they_start_and_arrive():
    assert run(Linear(4, 0.5), COUNT, 5) == [64, 40, 16, 16, 16]
    assert run(Linear(4, 1.0), RATIO, 4) == [1.0, 0.75, 0.5, 0.25]
    assert run(Cosine(3, 1.0), COUNT, 3) == [48, 32, 16]
    assert run(Constant(), RATIO, 3) == [0.25] * 3


def test_random_budgets_stay_in_bounds_and_fill_them():
    schedule = RandomBudget(0.5, 4)
    draws = [draw_for(3, step, 0).random() for step in range(300)]
    counts = [schedule.budget(COUNT, 0.5, draw).keep_tokens for draw in draws]
    ratios = [schedule.budget(RATIO, 0.5, draw).keep_ratio for draw in draws]
    assert min(counts) == 8
    assert 60 <= max(counts) <= 64
    assert all(0.125 <= ratio <= 1 for ratio in ratios)
    below = sum(count < 22.6 for count in counts)  # log-uniform: half lie below the geometric mean
    assert 120 <= below <= 180
    assert RandomBudget(2, 2).budget(COUNT, 0.0, 0.9).keep_tokens == 32
    assert RandomBudget(0.01, 0.01).budget(Budget(keep_tokens=3), 0.0, 0.9).keep_tokens == 1


def test_a_draw_depends_on_seed_and_counters_alone():
    assert draw_for(0, 5, 2).random() == draw_for(0, 5, 2).random()
    draws = {draw_for(*counters).random() for counters in [(0, 5, 2), (1, 5, 2), (0, 2, 5), (0, 52), (0, 5, 2, 0)]}
    assert len(draws) == 5


@pytest.mark.parametrize("make", [Linear, Cosine])
@pytest.mark.parametrize("arguments", [(0.5, 0.5), (4, 0), (4, 1.5)])
def test_impossible_ramps(make, arguments):
    with pytest.raises(ValueError, match=r"^A ramp needs start >= 1 and until in \(0, 1\], got[^\n]*$"):
        make(*arguments)


def test_impossible_random_budgets():
    with pytest.raises(ValueError, match="needs 0 < low <= high, got low 4 and high 2"):
        RandomBudget(4, 2)


def test_every_schedule_of_the_folder_has_a_name_in_recipes():
    found = set()
    for info in pkgutil.iter_modules(schedules.__path__):
        module = importlib.import_module(f"{schedules.__name__}.{info.name}")
        found |= {
            n
            for n, v in vars(module).items()
            if isinstance(v, type) and issubclass(v, Schedule) and v.__module__ == module.__name__
        }
    assert found - {"Schedule"} == set(list_schedules())
    assert all(getattr(schedules, name) is cls for name, cls in list_schedules().items())
    with pytest.raises(AttributeError, match="has no attribute 'Several'"):
        _ = schedules.Several


def test_steps_fall_in_equal_parts():
    assert run(Steps([4, 2], 1.0), COUNT, 5) == [64, 64, 32, 32, 16]
    assert run(Steps([9, 3], 0.5), RATIO, 9) == [1.0, 1.0, 0.75, 0.75, *[0.25] * 5]


def test_a_uniform_draw_favours_large_budgets():
    draws = [draw_for(3, step, 0).random() for step in range(300)]
    flat = [RandomBudget(0.5, 4, log=False).budget(COUNT, 0.5, draw).keep_tokens for draw in draws]
    assert min(flat) >= 8
    assert max(flat) <= 64
    assert 120 <= sum(count < 36 for count in flat) <= 180  # half lie below the mean of the bounds


def test_epics_window_is_that_of_its_script():
    """r_min = 0.1 + 0.16 p, r_max = 0.1 + 0.64 p, of what is dropped."""
    window = EpicWindow()
    for progress, draw, dropped in [(0, 0, 0.1), (0, 0.9, 0.1), (1, 0, 0.26), (1, 1, 0.74), (0.5, 0.5, 0.3)]:
        assert 1 - window.budget(RATIO, progress, draw).keep_ratio == pytest.approx(dropped)
        assert window.budget(COUNT, progress, draw) == window.budget(RATIO, progress, draw), "whatever the plan keeps"
    reaching = EpicWindow(reach=True)
    assert reaching.budget(Budget(keep_ratio=1 / 9), 1, 1).keep_ratio == pytest.approx(1 / 9)
    assert reaching.budget(Budget(keep_ratio=1 / 9), 0, 1).keep_ratio == pytest.approx(0.9)
    assert reaching.budget(Budget(keep_ratio=0.95), 1, 1).keep_ratio == pytest.approx(0.9), "never under its start"
    with pytest.raises(ValueError, match="needs a plan with keep_ratio"):
        reaching.budget(COUNT, 0.5, 0.5)


@pytest.mark.parametrize(
    "schedule", [EpicWindow(), EpicWindow(reach=True), Linear(), RandomBudget(), Matryoshka([2.0])]
)
def test_a_stage_that_retains_nothing_goes_on_to_do_so(schedule):
    nothing = Budget(keep_tokens=0)
    assert schedule.budgets(nothing, 0.5, 0.5) == [nothing]


def test_a_layer_ramp_ends_at_the_plans_layer():
    layers = [LayerRamp().layer(2, 32, progress_at(i, 31)) for i in range(31)]
    assert layers[0] == 31
    assert layers[-1] == 2
    assert layers == sorted(layers, reverse=True)
    assert layers[15] == round(32 - 15 / 30 * 30)
    assert LayerRamp(0.5).layer(2, 32, 0.5) == 2
    assert Constant().layer(2, 32, 0.0) == 2
    assert LayerRamp(budget=Linear(4, 1.0)).budgets(COUNT, 0.0, 0.5) == [Budget(keep_tokens=64)]
    assert LayerRamp().budgets(COUNT, 0.0, 0.5) == [COUNT]


def test_several_budgets_in_one_step():
    def count(schedule, draw=0.5):
        return [budget.keep_tokens for budget in schedule.budgets(COUNT, 0.5, draw)]

    assert count(Matryoshka([4, 1, 0.25])) == [64, 16, 4]
    assert count(Sandwich(0.25, 4))[:2] == [64, 4]
    assert {count(Sandwich(0.25, 4), draw)[2] for draw in (0.0, 0.5, 0.999)} == {4, 16, 64}
    assert [b.keep_ratio for b in Matryoshka([36, 4]).budgets(RATIO, 0, 0)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Steps([]), "Steps needs factors that never rise"),
        (lambda: Steps([2, 4]), "Steps needs factors that never rise, got"),
        (lambda: Matryoshka([1, 0]), "Matryoshka needs factors above 0, got"),
        (lambda: EpicWindow(first=1.0), "EpicWindow needs 0 <= first < 1"),
        (lambda: LayerRamp(0), "LayerRamp needs until"),
        (lambda: LayerRamp(budget=LayerRamp()), "LayerRamp.budget must be a schedule of budgets"),
        (lambda: Sandwich(3, 2), "Sandwich needs 0 < low <= high"),
    ],
)
def test_impossible_schedules(make, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        make()
