"""Folders and models that the tests of export read."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export.helpers import FRESH, STOCK, make_base, make_inputs, make_processor, run_python, two_stages
from transformers import LlavaProcessor
from transformers.utils import logging

from tpcompress.export import export, load
from tpcompress.insertion.attach import attach


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    return make_processor()


@pytest.fixture(scope="session")
def trained() -> Any:
    """An attached model; tests must not change it."""
    return attach(make_base(), two_stages()).eval()


@pytest.fixture(scope="session")
def exported(trained: Any, processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder; tests must not change it."""
    return export(trained, processor, tmp_path_factory.mktemp("exports") / "two_stages")


@pytest.fixture(scope="session")
def fresh(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One process of its own for all that needs one: first without tpcompress, then with it, and its answer."""
    path = tmp_path_factory.mktemp("fresh") / "answer.pt"
    return run_python(STOCK + FRESH, exported, path, root=None), path


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


@pytest.fixture
def base() -> Any:
    return make_base()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return make_inputs()


@pytest.fixture
def round_trip(processor: Any, tmp_path: Path) -> Callable[..., Any]:
    """Export a model and load it again."""

    def run(model: Any, **options: Any) -> Any:
        loading = {k: options.pop(k) for k in ("allow_outside", "dtype") if k in options}
        return load(export(model, processor, tmp_path / "out", **options), **loading)

    return run
