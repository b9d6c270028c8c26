"""What is set on an attached model, and what its calls share within one context."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from tpcompress.families import Parts
from tpcompress.insertion.call import Call
from tpcompress.insertion.context import PerContext
from tpcompress.insertion.plan import PruningPlan
from tpcompress.insertion.settings import Placement, Settings
from tpcompress.insertion.views.tower import TowerWatch

_settings: PerContext[Settings] = PerContext("tpcompress_settings")
_requests: PerContext[Request] = PerContext("tpcompress_requests")


@dataclass(eq=False)
class Request:
    """One forward call of the model, from its arguments to its loss.

    Attributes:
        labels_BS: the caller's labels.
        num_candidates: tokens at the end of the prompt that are candidates of assisted decoding.
        inner: the core model was called directly, without the model around it.
        call: state of the core model's call, once it runs; None if it leaves the model as it is.
    """

    labels_BS: Tensor | None = None
    num_candidates: int = 0
    inner: bool = False
    call: Call | None = None


@dataclass(eq=False)
class Attachment:
    """A plan on a model. Calls in several threads share it: it holds nothing that a call changes.

    Attributes:
        parts: of the model.
        plan: the stages.
        pruners: the model's own copies of the plan's pruners, its submodule `token_pruners`.
        tower: captures views of the vision tower.
        defaults: settings of every context that sets none.
        built: sums of the weights of each pruner as it was built; None if they were on the meta device.
        warned: warnings that were given once.
    """

    parts: Parts
    plan: PruningPlan
    pruners: nn.ModuleList
    tower: TowerWatch
    defaults: Settings
    built: list[list[float] | None] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, parts: Parts, plan: PruningPlan, pruners: nn.ModuleList, mode: str) -> Attachment:
        """A plan on a model, with the plan's budgets and layers."""
        placement = Placement.of(plan, [stage.layer for stage in plan.stages], len(parts.layers))
        defaults = Settings(mode, tuple(stage.budget for stage in plan.stages), placement)
        tower = TowerWatch(parts, [stage.pruner for stage in plan.stages])
        return cls(parts, plan, pruners, tower, defaults, [_sums(pruner) for pruner in pruners])

    @property
    def settings(self) -> Settings:
        """Settings of this context (thread or asyncio task), with the mode that `learn` means at the moment."""
        found = _settings.get(self) or self.defaults
        return found if found.mode != "learn" else replace(found, mode=self._learning_mode())

    @property
    def untrained(self) -> list[str]:
        """Names of learned pruners whose weights are those that they were built with."""
        pairs = zip(self.plan.stages, self.pruners, self.built, strict=True)
        return [s.pruner.name for s, pruner, built in pairs if s.pruner.learned and built and built == _sums(pruner)]

    def warn_once(self, message: str) -> None:
        """Warn of a use that goes wrong in silence, once per attached plan."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    def _learning_mode(self) -> str:
        """`mask` in training, unless every learned pruner trains on the pruned sequence; else `drop`."""
        learned: list[Any] = [pruner for pruner in self.pruners if pruner.learned and requires_grad(pruner)]
        full = any(not pruner.trainable_when_cut for pruner in learned)
        return "mask" if full and self.parts.model.training else "drop"

    @property
    def request(self) -> Request | None:
        """The call of the model under way in this context."""
        return _requests.get(self)

    @property
    def call(self) -> Call | None:
        """The call of the core model under way in this context, if it can change anything."""
        request = _requests.get(self)
        return None if request is None else request.call

    def set_defaults(self, **changes: Any) -> None:
        """Change settings for every context that sets none of its own (fields of `Settings`)."""
        self.defaults = replace(self.defaults, **changes)

    @contextmanager
    def using(self, **changes: Any) -> Iterator[None]:
        """Run a block under other settings, in this context only.

        Args:
            **changes: fields of `Settings`.

        Raises:
            ValueError: unknown mode, or another number of budgets than stages.
        """
        before = _settings.get(self) or self.defaults
        kept = {name: getattr(before, name) for name in changes}
        _settings.set(self, replace(before, **changes))
        try:
            yield
        finally:
            # Other fields may have been set in between by a block that is still open.
            after = replace(_settings.get(self) or self.defaults, **kept)
            _settings.set(self, None if after == self.defaults else after)

    @contextmanager
    def requesting(self, request: Request) -> Iterator[None]:
        """Run a call of the model. Whatever happens in it, nothing of it is left afterwards."""
        before = _requests.get(self)
        try:
            _requests.set(self, request)
            yield
        finally:
            _requests.set(self, before)

    def begin_inner(self) -> Request:
        """The request of a call of the core model, which is a new one if nothing around the core model opened it."""
        request = _requests.get(self)
        if request is None or request.inner:
            request = Request(inner=True)
            _requests.set(self, request)
        return request

    def end_inner(self) -> None:
        """End a request that `begin_inner` opened."""
        request = _requests.get(self)
        if request is not None and request.inner:
            _requests.set(self, None)


def requires_grad(module: nn.Module) -> bool:
    """Whether a weight of a module is to be trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _sums(pruner: nn.Module) -> list[float] | None:
    """Two sums of every weight, which training changes; None on the meta device."""
    weights = [weight.detach() for weight in pruner.parameters()]
    if any(weight.is_meta for weight in weights):
        return None
    return [float(total) for weight in weights for total in (weight.double().sum(), weight.double().abs().sum())]
