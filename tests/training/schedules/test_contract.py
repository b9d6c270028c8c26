"""What every schedule promises, with the arguments that its class gives for tests."""

import jsonargparse
import pytest

from tpcompress.insertion.plan import Budget
from tpcompress.training.schedules import Schedule, list_schedules

EACH = pytest.mark.parametrize(
    ("cls", "arguments"),
    [(cls, dict(each)) for cls in list_schedules().values() for each in cls.test_arguments],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
POINTS = [(progress / 8, draw) for progress in range(9) for draw in (0.0, 0.3, 1 - 2**-53)]
DEPTH = 12


@EACH
@pytest.mark.parametrize("final", [Budget(keep_ratio=0.25), Budget(keep_tokens=16), Budget(keep_tokens=1)])
def test_budgets_are_at_least_one_token_and_repeat(cls, arguments, final):
    schedule = cls(**arguments)
    for point in POINTS:
        budgets = schedule.budgets(final, *point)
        assert budgets
        assert all(budget.count(144) >= 1 for budget in budgets)
        assert all(budget.keep_ratio is None or 0 < budget.keep_ratio <= 1 for budget in budgets)
        assert cls(**arguments).budgets(final, *point) == budgets


@EACH
def test_a_stage_that_keeps_no_token_keeps_none_throughout(cls, arguments):
    final = Budget(keep_tokens=0)
    assert all(set(cls(**arguments).budgets(final, *point)) == {final} for point in POINTS)


@EACH
def test_layers_move_only_if_it_says_so_and_end_at_the_plan(cls, arguments):
    schedule = cls(**arguments)
    layers = [schedule.layer(4, DEPTH, progress) for progress, _ in POINTS]
    assert all(0 <= layer < DEPTH for layer in layers)
    assert layers[-1] == 4
    assert schedule.moves or set(layers) == {4}


@EACH
def test_recipes_name_schedules_by_class(cls, arguments):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=Schedule)
    config = {"schedule": {"class_path": cls.__name__, "init_args": arguments}}
    assert type(parser.instantiate(parser.parse_object(config)).schedule) is cls
