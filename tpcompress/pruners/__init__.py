"""WHAT stays: one file per pruner, found by being here. See README, "Adding a pruner"."""

from tpcompress.pruners.base import Pruner, Selection, TokenView
from tpcompress.pruners.registry import create, list_pruners, pruner_class

__all__ = ["Pruner", "Selection", "TokenView", "create", "list_pruners", "pruner_class"]
