"""What a compression prints at its end: one sentence, and the commands that come next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpcompress.evaluation.compare.report import Report
from tpcompress.evaluation.compare.row import Row
from tpcompress.evaluation.compare.table import tokens


def sentence(report: Report, choice: Mapping[str, Any], keep: str, verified: bool) -> str:
    """The result in one sentence, with every score that it should be held against.

    Args:
        report: report of the comparison.
        choice: the chosen rule and how many were ranked.
        keep: the budget as it was given.
        verified: whether the export behaves as the trained model.
    """
    unit = report.metric.unit
    (trained,) = report.arm("training_aware")
    dense = next(iter(report.arm("dense")), None)
    bare = next((row for row in report.arm("dense_ft") if row.pruner is None), None)
    pruned = next((row for row in report.arm("dense_ft") if row.pruner is not None), None)
    free = report.twin(trained, "training_free")
    if trained.score is None:
        return (
            f"{choice['rule']} was trained in the loop at {keep}, but the scores say nothing about pruning: on these "
            f"rows the dense model answers no better with the images than with blank ones. Give a model that has "
            f"learnt such questions, or more rows."
        )
    others = [
        ("the dense model", dense),
        ("the dense model after the same steps", bare),
        ("that model pruned alike", pruned),
        ("the rule without training", free),
    ]
    against = ", ".join(f"{_score(row, unit)} for {name}" for name, row in others if row is not None)
    return (
        f"{choice['rule']} at layer {choice['layer']}, the best of {choice['ranked']} rules at {keep}, trained in the "
        f"loop, scores {_score(trained, unit)} with {tokens(trained.retained_tokens)} of "
        f"{tokens(trained.vision_tokens)} vision tokens per question on {trained.num_images} held-out rows, against "
        f"{against}; the export is {'verified' if verified else 'NOT verified, see above'}. {serving_sentence(choice)}"
    )


def serving_sentence(choice: Mapping[str, Any]) -> str:
    """Which serving engines can run the chosen plan, or why none can.

    Args:
        choice: the chosen rule, with `engines` and `not_servable`; a choice of an earlier version has neither.
    """
    if choice.get("not_servable"):
        return f"No serving engine can run it: {choice['not_servable']}; --servable chooses among plans that one can."
    if choice.get("engines"):
        return f"Servable with {' and '.join(choice['engines'])}."
    if "engines" in choice:
        return "Servable as part of an image encoder; no engine that this version knows has a class for this model yet."
    return "tpcompress export prints which engines can run it."


def next_commands(folder: Path, export: Path) -> list[str]:
    """Commands that go on from the files of the folder, with a heading."""
    own, quoted = shlex.quote(str(folder)), shlex.quote(str(export))
    return [
        "next:",
        f"  serve      tpcompress serve {quoted}",
        f"  look       tpcompress inspect {quoted} --image IMAGE --prompt QUESTION",
        f"  evaluate   tpcompress compare {own}/compare.yaml --out {own}/compare",
        f"  repeat     tpcompress fit --config {own}/recipe.yaml",
        f"  push       tpcompress push {quoted} USER/NAME --private",
    ]


def _score(row: Row, unit: Any) -> str:
    interval = "" if row.ci95 is None else f" ± {unit.number(row.ci95)}"
    return f"{unit.text(row.score)}{interval}" if row.score is not None else "no score"
