"""Estimators by name: ways to pass a gradient through a discrete choice of tokens.

An estimator is a selector, an applier, training at full length, on gathered tokens or on both in turns, and losses
beside the label loss. Which of them train a scorer from scratch is measured on the toy task, see `toy_run`, and stored
in `tpcompress.training.diagnostics.estimator_results`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tpcompress.training import losses as known_losses
from tpcompress.training.diagnostics.estimator_results import LEARNS, mark_of, training_of
from tpcompress.training.losses import Loss, Ramp
from tpcompress.training.losses.label import Label

SCORER = {"type": "mlp", "width": 32}
"""Random weights, so that its skill after training comes from training alone."""

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Estimator:
    """One way to train a scorer.

    Attributes:
        name: name in tables and on the shell.
        selector, applier: parts of `learned_gate`, as in plans.
        full_every: as in a phase of training: 1 always at full length, 0 never, m in one step of m.
        losses: losses beside the label loss, as in recipes: class and arguments.
        source: published method that trains in this way.
    """

    name: str
    selector: Config
    applier: Config
    full_every: int = 1
    losses: tuple[Config, ...] = field(default=())
    source: str = ""

    @property
    def training(self) -> str:
        """The word for `full_every`."""
        return training_of(self.full_every)

    def pruner(self, scorer: str | Config = SCORER) -> dict[str, Any]:
        """The config of its `learned_gate`."""
        return {
            "type": "learned_gate",
            "scorer": {"type": scorer} if isinstance(scorer, str) else dict(scorer),
            "selector": dict(self.selector),
            "applier": dict(self.applier),
        }

    def make_losses(self) -> list[Loss]:
        """The label loss and the losses of the estimator."""
        return [Label(), *(_make_loss(config) for config in self.losses)]

    def recipe_losses(self) -> list[dict[str, Any]]:
        """The same losses as in a recipe."""
        return [{"class_path": "Label"}, *(dict(config) for config in self.losses)]

    def full_length(self, step: int) -> bool:
        """Whether a step runs at full length; in a mix, the first of every `full_every` steps does."""
        return self.full_every > 0 and step % self.full_every == 0


def _make_loss(config: Config) -> Loss:
    arguments = dict(config.get("init_args", {}))
    if isinstance(arguments.get("weight"), Mapping):
        arguments["weight"] = Ramp(**arguments["weight"])
    classes = {cls.__name__: cls for cls in known_losses.list_losses().values()}
    return classes[config["class_path"]](**arguments)


SOFT = {"type": "soft_topk"}
LAPLACE = {"type": "soft_topk", "relaxation": "laplace"}
HARD = {"type": "straight_through"}
SHARPEN = {"class_path": "BCE", "init_args": {"weight": {"start": 0.1, "end": 2.0}}}
ON_BUDGET = {"class_path": "OnBudget", "init_args": {"weight": 100.0}}
TRIAL = {"class_path": "ScoreFunction"}

_LISTED = (
    Estimator("soft value", SOFT, {"type": "value"}),
    Estimator("soft value laplace", LAPLACE, {"type": "value"}),
    Estimator("soft noise", SOFT, {"type": "noise"}, source="AutoSelect"),
    Estimator("soft noise laplace", LAPLACE, {"type": "noise"}),
    Estimator("soft log_bias", SOFT, {"type": "log_bias"}),
    Estimator("soft log_bias laplace", LAPLACE, {"type": "log_bias"}),
    Estimator("soft scale", SOFT, {"type": "scale"}),
    Estimator("soft scale bce", SOFT, {"type": "scale"}, losses=(SHARPEN,), source="VisionSelector"),
    Estimator("hard value", HARD, {"type": "value"}),
    Estimator("hard log_bias", HARD, {"type": "log_bias"}),
    Estimator("gumbel log_bias", {"type": "gumbel"}, {"type": "log_bias"}, losses=(ON_BUDGET,), source="Dynamic-LLaVA"),
    Estimator("threshold value", {"type": "threshold"}, {"type": "value"}, losses=(ON_BUDGET,), source="LTP"),
    Estimator("trial", {"type": "gumbel_topk"}, {"type": "gather"}, full_every=0, losses=(TRIAL,)),
    Estimator("mix value", HARD, {"type": "value"}, full_every=4),
    Estimator("mix log_bias", HARD, {"type": "log_bias"}, full_every=4),
    Estimator("gathered merge", HARD, {"type": "merge"}, full_every=0),
    Estimator("gathered rest", {"type": "topk"}, {"type": "rest"}, full_every=0, source="EViT"),
    Estimator("cold gathered", HARD, {"type": "gather_value"}, full_every=0),
)

ESTIMATORS: dict[str, Estimator] = {estimator.name: estimator for estimator in _LISTED}
"""Every estimator of the table, by name."""


def learns(name: str) -> bool:
    """Whether an estimator trained a scorer from scratch when it was last measured.

    Raises:
        ValueError: no such estimator.
    """
    estimator = find_estimator(name)
    return mark_of(str(estimator.selector["type"]), str(estimator.applier["type"]), estimator.full_every) == LEARNS


def find_estimator(name: str) -> Estimator:
    """An estimator by name.

    Raises:
        ValueError: unknown.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"No estimator '{name}'; known: {', '.join(ESTIMATORS)}.")
    return ESTIMATORS[name]
