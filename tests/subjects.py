"""One variant of a family under test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exact import tolerance
from structure import structure
from support import Case, Sample, batch, case_id, generate, logit_gap, tiny_model

from tpcompress.families import Family, list_families, resolve
from tpcompress.insertion.attach import ATTACHED, detach
from tpcompress.insertion.plan import PruningPlan, Stage


@dataclass
class Subject:
    """One variant of a family under test.

    Attributes:
        case: its name and the arguments of its config.
        model: to attach plans to.
        base: with the same weights; stays unattached.
    """

    case: Case
    model: Any
    base: Any

    @property
    def family(self) -> Family:
        return list_families()[self.case[0]]

    @property
    def kinds(self) -> list[str]:
        """Every kind of image that the family knows."""
        return list(self.family.tiny.kinds)

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def hides(self) -> bool:
        """Mode `mask` works at any length: no layer counts columns or carries a state."""
        return structure(self.case).hides

    def batch(self, *samples: Sample, side: str = "left", seed: int = 0) -> dict[str, Any]:
        """Inputs of one call."""
        return batch(samples, side, seed, self.case[0], self.config)

    def plan(self, stages: Sequence[Stage], **policies: Any) -> PruningPlan:
        """Stages moved to layers where this model can be pruned."""
        possible = resolve(self.base).stage_layers
        moved: dict[int, Stage] = {}
        for stage in stages:
            layer = min(stage.layer, possible[-1])
            moved.setdefault(layer, replace(stage, layer=layer))
        return PruningPlan(list(moved.values()), **policies)


_subjects: dict[str, Subject] = {}


def lent(case: Case) -> Iterator[Subject]:
    """A variant's models, which all tests of a process share; detached afterwards if the test did not."""
    name = case_id(case)
    if name not in _subjects:
        _subjects[name] = Subject(case, tiny_model(case[0], *case[1]), tiny_model(case[0], *case[1]))
    subject = _subjects[name]
    yield subject
    subject.model.eval().zero_grad(set_to_none=True)
    if hasattr(subject.model, ATTACHED):
        detach(subject.model)


def ragged(subject: Subject) -> list[Sample]:
    """Samples with one image, two, none and all kinds."""
    return [(5, 1, 7), (3, 2, 8), (4, 0, 9), (6, subject.kinds, 4)]


def recomputes(subject: Subject, inputs: dict[str, Any]) -> bool:
    """Whether the unpruned model itself does without a cache, and gives the same (ERNIE's expert types do not)."""
    try:
        runs = [generate(subject.base, inputs, new=4, use_cache=cache) for cache in (True, False)]
    except (ValueError, IndexError):
        return False
    return logit_gap(*runs) < tolerance(subject.base)
