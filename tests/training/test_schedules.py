"""Budgets over a phase."""

import pytest

from tpcompress.insertion.plan import Budget
from tpcompress.training.schedules import Constant, Cosine, Linear, RandomBudget, Schedule, draw_for, progress_at

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
