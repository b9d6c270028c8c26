"""One variant of a family under test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from exact import tolerance
from support import Case, Sample, batch, case_id, generate, logit_gap, model_cases, tiny_model

from tpcompress.families import Family, list_families, resolve
from tpcompress.insertion.attach import ATTACHED, detach
from tpcompress.insertion.plan import PruningPlan, Stage


def combinations(names: Iterable[str], *quick: str) -> pytest.MarkDecorator:
    """Plans by name with both position policies; what is not among the `quick` ones ("name, policy") is slow."""
    both = [(name, policy) for name in names for policy in ("original", "compact")]
    marked = [
        pytest.param(*pair, marks=() if ", ".join(pair) in quick else pytest.mark.slow, id=" ".join(pair))
        for pair in both
    ]
    return pytest.mark.parametrize(("name", "positions"), marked)


def plans(names: Iterable[str], *quick: str) -> pytest.MarkDecorator:
    """Plans by name; what is not among the `quick` ones is slow."""
    marked = [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marked)


def quick_cases(quick: Sequence[str]) -> list[Any]:
    """Every family and variant; what is not among the `quick` ones is slow."""
    return [
        pytest.param(case, id=case_id(case), marks=() if case_id(case) in quick else pytest.mark.slow)
        for case in model_cases()
    ]


def families_first() -> list[Any]:
    """Every family and variant; a family's variants after its first are slow."""
    return quick_cases([case_id((name, family.tiny.variants[0])) for name, family in list_families().items()])


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
        """Every kind of picture that the family knows."""
        return list(self.family.tiny.kinds)

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def hides(self) -> bool:
        """Mode `mask` works at any length: no layer counts columns or carries a state."""
        kinds = getattr(self.config.get_text_config(), "layer_types", None) or ()
        window = getattr(self.config.get_text_config(), "sliding_window", None)
        return not (set(kinds) & {"conv", "linear_attention", "sliding_attention"} or (window and not kinds))

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
    """Samples with one picture, two, none and all kinds."""
    return [(5, 1, 7), (3, 2, 8), (4, 0, 9), (6, subject.kinds, 4)]


def recomputes(subject: Subject, inputs: dict[str, Any]) -> bool:
    """Whether the unpruned model itself does without a cache, and gives the same (ERNIE's expert types do not)."""
    try:
        runs = [generate(subject.base, inputs, new=4, use_cache=cache) for cache in (True, False)]
    except (ValueError, IndexError):
        return False
    return logit_gap(*runs) < tolerance(subject.base)
