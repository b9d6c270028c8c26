"""What the code of an export leaves out of the package's sources, beyond what nothing in it refers to.

These members read plans from text and files, or build the random models of the tests. The folder of an export holds one
plan in its config.json, and its weights.
"""

from __future__ import annotations

MEMBERS: dict[str, tuple[str, ...]] = {
    "tpcompress.families.base": ("Family.tiny", "Family.requires"),
    "tpcompress.insertion.plan": (
        "PruningPlan.of", "PruningPlan.to_yaml", "PruningPlan.to_json", "PruningPlan.from_yaml",
        "PruningPlan.from_json",
    ),
}  # fmt: skip
"""Methods and fields that are left out, by module."""

KEYWORDS = {"tiny": ("Family", "replace")}
"""Arguments that are left out of the calls that describe a family, and the functions called."""
