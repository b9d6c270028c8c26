"""The ways through insertion: kind of plan x positions x mode x kind of call. Tests declare them, calls show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from structure import Structure
from transformers import StaticCache

from tpcompress.insertion.attach import attachment_of, is_attached
from tpcompress.insertion.plan import Stage


class Way(NamedTuple):
    """One way through insertion.

    Attributes:
        plan: `input` (layer 0), `inside` (one later layer), `several`, `merging`, `learned` or `gates`.
        positions: position policy of the plan.
        mode: `drop`, `mask` or `off`.
        call: `forward` (no cache given), `training` (with gradients), `prefill` and `decoding` (into and from a given
            cache), `continuing` (a longer turn after a cache); `static ...` with a cache of fixed length.
    """

    plan: str
    positions: str
    mode: str
    call: str


def ways(*calls: str, plan: Sequence[Stage] | str = (), positions: str = "original") -> pytest.MarkDecorator:
    """Declare the ways that a test takes with the model of its `subject`; they are checked while it runs.

    Args:
        calls: "mode call" of each.
        plan: stages or the kind of plan; by default the test's parameter `name`, looked up in its module's `PLANS`.
        positions: policy; the test's parameter of this name comes first.
    """
    return pytest.mark.ways(*calls, plan=plan, positions=positions)


def kind_of(stages: Sequence[Stage]) -> str:
    """The kind of a plan."""
    if any(stage.pruner.gates for stage in stages):
        return "gates"
    if any(stage.pruner.learned for stage in stages):
        return "learned"
    if any(stage.pruner.merges for stage in stages):
        return "merging"
    if len(stages) > 1:
        return "several"
    return "input" if stages[0].layer == 0 else "inside"


def declared(item: Any, structure: Structure) -> set[Way]:
    """The ways that a collected test declares; where tokens cannot be hidden, none in mode `mask`."""
    found: set[Way] = set()
    params = item.callspec.params if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("ways"):
        plan = mark.kwargs["plan"] or item.module.PLANS[params["name"]]
        kind = plan if isinstance(plan, str) else kind_of(plan)
        positions = params.get("positions", mark.kwargs["positions"])
        found |= {Way(kind, positions, *call.split(" ", 1)) for call in mark.args}
    return {way for way in found if structure.hides or way.mode != "mask" or way.plan in ("learned", "gates")}


@contextmanager
def watched(model: Any) -> Iterator[set[Way]]:
    """The ways of the calls of a model while a plan is attached to it."""
    seen: set[Way] = set()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if is_attached(module):
            attached = attachment_of(module)
            stages = attached.plan.stages
            seen.add(Way(kind_of(stages), attached.plan.positions, attached.settings.mode, kind_of_call(args, kwargs)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def kind_of_call(args: Any, kwargs: dict[str, Any]) -> str:
    """The kind of one call of the outermost model."""
    cache = kwargs.get("past_key_values")
    if torch.is_grad_enabled():
        return "training"
    if cache is None:
        return "forward"
    static = "static " if isinstance(cache, StaticCache) else ""
    if int(cache.get_seq_length()) == 0:
        return f"{static}prefill"
    return f"{static}decoding" if kwargs["input_ids"].shape[1] == 1 else f"{static}continuing"
