"""The model classes that lmms-eval loads. They are made on access, as their base class is part of lmms-eval."""

from __future__ import annotations

from functools import cache

from tpcompress.harness.lmms_eval.adapter import Adapter
from tpcompress.harness.lmms_eval.chat import ChatRequests
from tpcompress.harness.lmms_eval.simple import SimpleRequests

CLASSES: dict[str, type] = {"TpcompressChat": ChatRequests, "TpcompressSimple": SimpleRequests}
"""Classes by the way in which tasks hand over their prompts: as messages, or as a text with a list of media."""


def __getattr__(name: str) -> type:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return _made(name)


@cache
def _made(name: str) -> type:
    from lmms_eval.api.model import lmms

    requests = CLASSES[name]
    return type(name, (requests, Adapter, lmms), {"__module__": __name__, "__doc__": requests.__doc__})
