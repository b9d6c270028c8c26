"""Model families: one file each, registered automatically, that describes the vision tokens of a model type."""

from tpcompress.families.base import Family, Parts, Tiles, Tower, family_of, list_families, resolve
from tpcompress.families.layout import Grid, Layout

__all__ = ["Family", "Grid", "Layout", "Parts", "Tiles", "Tower", "family_of", "list_families", "resolve"]
