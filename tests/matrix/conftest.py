"""Every family: tiny models that all tests of one process share. Variants after a family's first are slow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from subjects import Subject, families_first, lent


@pytest.fixture(params=families_first())
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """A family's tiny model, detached afterwards if the test did not: what attaches also detaches."""
    yield from lent(request.param)
