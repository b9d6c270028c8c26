"""Models that many tests share. Tests must not change them: what attaches also detaches."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import tiny_model
from transformers.utils import logging

from tpcompress.insertion.attach import ATTACHED, detach


def pytest_collection_finish() -> None:
    """What imports and collection made stays: the collections of a long run need not go through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(scope="session")
def _bases() -> dict[str, Any]:
    return {}


def _base(bases: dict[str, Any], impl: str) -> Any:
    if impl not in bases:
        bases[impl] = tiny_model(impl=impl)
    return bases[impl]


@pytest.fixture
def base(_bases: dict[str, Any]) -> Any:
    """A tiny LLaVA that stays unattached: the reference."""
    return _base(_bases, "sdpa")


@pytest.fixture
def model(_bases: dict[str, Any]) -> Iterator[Any]:
    """A tiny LLaVA with the weights of `base`, to attach plans to; detached afterwards if the test did not."""
    if "model" not in _bases:
        _bases["model"] = tiny_model()
    model = _bases["model"].eval()
    yield model
    if hasattr(model, ATTACHED):
        detach(model)
    model.zero_grad(set_to_none=True)


@pytest.fixture
def eager_model(_bases: dict[str, Any]) -> Iterator[Any]:
    """The same with eager attention."""
    model = _base(_bases, "eager")
    yield model
    if hasattr(model, ATTACHED):
        detach(model)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
