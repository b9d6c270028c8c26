"""WHERE vision tokens are: one file per model family, found by being here. See README, "A new model family"."""

from tpcompress.families.base import Family, ImageTokens, Parts, family_of, list_families, resolve, rotary_of

__all__ = ["Family", "ImageTokens", "Parts", "family_of", "list_families", "resolve", "rotary_of"]
