"""One variant per structural class: models that all tests of a process share, and a check of declared ways."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
from structure import cases, representatives, structure
from subjects import Subject, lent
from ways import declared, watched


@pytest.fixture(params=cases(representatives().values()))
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """A variant's tiny model, detached afterwards if the test did not: what attaches also detaches."""
    yield from lent(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Generator[None, object, object]:
    """A test that declares ways must take them."""
    if not any(pyfuncitem.iter_markers("ways")):
        return (yield)
    subject = pyfuncitem.funcargs["subject"]
    with watched(subject.model) as seen:
        result = yield
    missing = declared(pyfuncitem, structure(subject.case)) - seen
    assert not missing, f"{pyfuncitem.name} declares {missing}, but its calls were {seen}"
    return result
