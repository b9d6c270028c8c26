"""Every family, every variant: tiny models that all tests of one process share. What attaches also detaches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from subjects import Subject, lent
from support import case_id, model_cases


@pytest.fixture(params=model_cases(), ids=case_id)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """A family's tiny model, detached afterwards if the test did not."""
    yield from lent(request.param)
