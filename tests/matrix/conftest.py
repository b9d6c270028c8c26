"""Every family, every variant: tiny models that all tests of one process share. What attaches also detaches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from subjects import Subject
from support import Case, case_id, model_cases, tiny_model

from tpcompress.insertion.attach import CONTROLLER, detach

_subjects: dict[str, Subject] = {}


@pytest.fixture(params=model_cases(), ids=case_id)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    """A family's tiny model, detached afterwards if the test did not."""
    yield from _lent(request.param)


def _lent(case: Case) -> Iterator[Subject]:
    name = case_id(case)
    if name not in _subjects:
        _subjects[name] = Subject(case, tiny_model(case[0], *case[1]), tiny_model(case[0], *case[1]))
    subject = _subjects[name]
    yield subject
    subject.model.eval().zero_grad(set_to_none=True)
    if hasattr(subject.model, CONTROLLER):
        detach(subject.model)
