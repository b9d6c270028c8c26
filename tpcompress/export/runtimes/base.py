"""Base class of runtimes, the registry, and the reasons that runtimes share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from tpcompress.export.folder import MANIFEST, read_json
from tpcompress.insertion.plan import PruningPlan
from tpcompress.open_set import named_classes
from tpcompress.pruners.catalogue import unserved


class Runtime:
    """A program that may run an export. A subclass sets `name` and `title`, and defines `refuses`."""

    name: ClassVar[str]
    """Key in manifests: lower case."""
    title: ClassVar[str]
    """Name in printed lines."""
    serves: ClassVar[bool] = False
    """Whether it is a serving engine, which `tpcompress compress --servable` chooses plans for."""

    def refuses(self, plan: PruningPlan, config: Any) -> str | None:
        """Reason why the runtime cannot run a plan on a model, in one line that starts in lower case; None if it can.

        Args:
            plan: the plan of the export.
            config: config of the model, stock or exported.
        """
        raise NotImplementedError(f"{type(self).__name__} must define refuses(plan, config) -> str | None.")


@cache
def list_runtimes() -> dict[str, Runtime]:
    """All runtimes of this folder by name."""
    found: dict[str, type[Runtime]] = named_classes("tpcompress.export.runtimes", Runtime, "runtime")
    return {name: cls() for name, cls in found.items()}


def runtimes_of(plan: PruningPlan, config: Any) -> dict[str, str | None]:
    """By runtime: None if it can run the plan on the model, else the reason why not."""
    return {name: runtime.refuses(plan, config) for name, runtime in list_runtimes().items()}


def report(found: Mapping[str, str | None]) -> list[str]:
    """One line per runtime: `vLLM: yes`, or `vLLM: no, REASON`.

    Args:
        found: as returned by `runtimes_of`, or `runtimes` of a manifest, which may name runtimes that this version does
            not know.
    """
    titles = {name: runtime.title for name, runtime in list_runtimes().items()}
    return [
        f"{titles.get(name, name)}: {'yes' if reason is None else f'no, {reason}'}" for name, reason in found.items()
    ]


def runtime_lines(folder: Path) -> list[str]:
    """The lines of `report` for a folder that was just exported; none for a dense model."""
    file = folder / MANIFEST
    return report(read_json(file).get("runtimes", {})) if file.is_file() else []


def outside_encoder(plan: PruningPlan) -> str | None:
    """Reason why a plan is not a property of the image encoder, whose outputs engines count and cache; None if it is.

    Such a plan has one stage before the language model that does not read the prompt, and its counts follow from the
    size of an image.
    """
    late = [number for number, stage in enumerate(plan.stages) if stage.layer > 0]
    if late:
        return f"stage {late[0]} acts at layer {plan.stages[late[0]].layer}, inside the language model"
    for stage in plan.stages:
        reason = unserved(stage.pruner)
        if reason is not None:
            return reason
    if plan.scope == "prompt":
        return "the budget holds per prompt, so an image's count depends on the other images; use scope: image"
    return None
