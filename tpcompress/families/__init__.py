"""WHERE vision tokens are: one file per model family, found by being here. See README, "A new model family"."""

from tpcompress.families.base import Family, Parts, Tower, family_of, list_families, resolve
from tpcompress.families.layout import Grid, Layout

__all__ = ["Family", "Grid", "Layout", "Parts", "Tower", "family_of", "list_families", "resolve"]
