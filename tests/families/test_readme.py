"""The guide for adding a family explains every field of `Family`."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from tpcompress.families import Family

GUIDE = Path(__file__).parents[2] / "scripts/docs_site/guides/adding/family.md"


def test_it_explains_every_field() -> None:
    cells = [line.split("|")[1] for line in GUIDE.read_text().splitlines() if line.startswith("| `")]
    explained = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(explained) == sorted(field.name for field in fields(Family))
