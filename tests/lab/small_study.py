"""A study of two steps and two images."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tpcompress.lab.study.config import Contender, Study, Way

QUIET = Console(quiet=True)


SHIPPED = "recipes/studies/training_aware.yaml"


DATA = {"class_path": "BenchmarkData", "init_args": {"num_train": 4, "num_val": 0, "batch_size": 2}}


KL = {"teacher": "FrozenCopy", "losses": ["Label", {"class_path": "KL", "init_args": {"weight": 1.0}}]}


def small(**others) -> Study:
    """Two steps of two images."""
    values = {
        "recipe": {"trainer": {"max_steps": 2}, "model": {"optimizer": {"lr": 5e-4}}, "data": DATA},
        "contenders": (
            Contender("random", "random", seeded=True),
            Contender(
                "gate", "learned_gate", recipe={"model": {"train": ["language_model"], "pruner_phase": {"steps": 1}}}
            ),
        ),
        "ways": (Way("loop"),),
        "budgets": (16,),
        "focus": 16,
        "num_images": 6,
    }
    return Study(**(values | others))


def place(cell, *names: str) -> tuple:
    return tuple(cell.labels[name] for name in names)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "cells").iterdir()}
