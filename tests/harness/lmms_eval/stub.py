"""The part of lmms-eval's contract that the adapter uses, written from its interface: base class, requests, results."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest


class BaseModel:
    """`lmms_eval.api.model.lmms`."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @staticmethod
    def _resolve_system_prompt(value: str) -> str:
        return value

    def clean(self) -> None:
        self.cleaned = True


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@dataclass
class Request:
    """A request: arguments as tasks make them."""

    args: tuple[Any, ...]


def install(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put the stub in the place of lmms-eval; returns the list that throughput metrics are logged to."""
    logged: list[dict[str, Any]] = []
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": BaseModel},
        "lmms_eval.api.instance": {"TokenCounts": TokenCounts, "GenerationResult": GenerationResult},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda **given: logged.append(given)},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        patch.setitem(sys.modules, name, module)
    return logged
