"""Documentation of the model families, generated from their descriptions without building a model."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable
from dataclasses import MISSING, dataclass

from tpcompress.errors import did_you_mean
from tpcompress.families.base import Family, list_families, own_keys
from tpcompress.families.packages import takes_videos
from tpcompress.families.refused import REFUSED, check_not_refused

COLUMNS = ("fit", "batch", "images", "video", "tower", "install")
"""The keys of `facts`: which rows it trains on (`yes` for any chat), what one batch may mix (`one kind` for images or
videos), sizes of images, video, whether pruners can read the vision tower, and packages that the processor needs."""


@dataclass(frozen=True)
class Description:
    """Documentation of one family.

    Attributes:
        name: name of the family.
        model_types: values of `config.model_type`.
        summary: one sentence: the first paragraph of the file's docstring.
        text: docstring of the file, one line per paragraph.
        facts: capabilities in a word or two, by the names in `COLUMNS`.
        details: the same in sentences, with model types and paths.
        limits: known limitations, one sentence each.
        file: file name of the family in tpcompress/families.
    """

    name: str
    model_types: tuple[str, ...]
    summary: str
    text: str
    facts: dict[str, str]
    details: dict[str, str]
    limits: tuple[str, ...]
    file: str


@dataclass(frozen=True)
class FieldDoc:
    """Documentation of one field of `Family`.

    Attributes:
        name: name of the field.
        text: its meaning, from the docstring of `Family`.
        default: Python expression of the default; None for a required field.
    """

    name: str
    text: str
    default: str | None


def describe(family: Family) -> Description:
    """Everything that a page about a family needs."""
    text = about(family)
    return Description(
        name=family.name,
        model_types=family.model_types,
        summary=text.partition("\n")[0],
        text=text,
        facts=facts(family),
        details=in_full(family),
        limits=family.limits,
        file=f"{_module(family).rpartition('.')[2]}.py",
    )


def describe_all() -> list[Description]:
    """The descriptions of all families, by name."""
    return [describe(family) for family in list_families().values()]


def field_docs() -> list[FieldDoc]:
    """The fields of `Family` with their documentation and defaults, required fields first."""
    texts = attribute_docs(Family)
    found = []
    for field in dataclasses.fields(Family):
        default = field.default
        shown = None if default is MISSING else default.__name__ if inspect.isfunction(default) else repr(default)
        found.append(FieldDoc(field.name, texts[field.name], shown))
    return found


def refusals() -> dict[str, list[str]]:
    """The refused model types of each reason."""
    return by_reason(REFUSED.items())


def attribute_docs(cls: type) -> dict[str, str]:
    """The entries of the `Attributes:` section of a docstring, by name; `a, b: text` documents both."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        entry = line.removeprefix("    ")
        if not line.startswith("    "):
            break
        if not entry.startswith(" "):
            head, _, entry = entry.partition(": ")
            names = head.split(", ")
        for name in names:
            found[name] = f"{found.get(name, '')} {entry.strip()}".strip()
    return found


def facts(family: Family) -> dict[str, str]:
    """Capabilities of a family in a word or two: a row of the table of all families."""
    lacks = [words for kind, words in LACKS.items() if kind not in family.takes]
    one_placeholder = family.video_layouts is not None and family.video_token == family.image_token
    video = "yes" if family.video_layouts is not None else "as images" if takes_videos(family.model_types) else "-"
    return {
        "fit": f"one {' and '.join(lacks)}" if lacks else "yes",
        "batch": "one kind" if one_placeholder else "yes",
        "images": "one size" if family.one_size else "any size",
        "video": video,
        "tower": "yes" if family.tower is not None else "-",
        "install": ", ".join(family.requires) or "-",
    }


LACKS = {"turns": "question", "images": "image"}
"""What a row has one of, by what is not in `Family.takes`."""


def markdown_table() -> str:
    """The table of all families in Markdown, a line per family."""
    rows = [["family", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[f"`{name}`", *facts(family).values()] for name, family in list_families().items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def in_full(family: Family) -> dict[str, str]:
    """Capabilities of a family in sentences, with model types and paths."""
    found = facts(family)
    attention = "causal"
    if family.blocks is not None:
        attention = f"bidirectional within blocks of tokens, in {' and '.join(family.blocks.kinds)} layers"
    stages = "before the language model and before every decoder layer"
    if family.keys_of is not own_keys:
        stages = "before the language model, and before layers from which on no layer reads keys of an earlier one"
    rows = "with several images and turns, and without images"
    if found["fit"] != "yes":
        rows = f"with {found['fit']} each" + ("" if "text" in family.takes else ", and none without an image")
    video = {
        "yes": "frames are grids of one video", "as images": "every frame counts as an image",
        "-": "not supported; pass frames as images",
    }[found["video"]]  # fmt: skip
    return {
        "model types": ", ".join(family.model_types),
        "vision tower": family.vision_tower,
        "projector": family.projector,
        "language model": family.language_model,
        "decoder layers": family.layers,
        "positions": "time, height and width (M-RoPE)" if family.positions == "mrope" else "one per token",
        "images": "one size" if family.one_size else "several sizes, as a whole or in tiles",
        "video": video,
        "attention": attention,
        "stages": stages,
        "tower": "pruners can read attention, keys and features of its layers" if family.tower else "not readable",
        "training rows": rows,
        "batches": "images or videos, not both" if found["batch"] != "yes" else "rows of all kinds together",
        "to install": ", ".join(family.requires) or "nothing beyond the core",
    }


def about(family: Family) -> str:
    """The docstring of the file of a family, one line per paragraph."""
    text = inspect.getdoc(sys.modules[_module(family)]) or ""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def by_reason(reasons: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group pairs (name, reason) to the names of each reason."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons:
        found.setdefault(reason, []).append(name)
    return found


def find(name: str) -> Family:
    """A family by its name or by a model type.

    Raises:
        ValueError: the name is refused (with the reason) or unknown (with the closest name).
    """
    known = {t: family for family in list_families().values() for t in family.model_types} | list_families()
    if name in known:
        return known[name]
    check_not_refused(name)
    hint = did_you_mean(name, known)
    raise ValueError(f"No family or model type '{name}'; `tpcompress families` lists them.{hint}")


def _module(family: Family) -> str:
    """Module that describes a family: the one that defines its tiny config."""
    return family.tiny.config.__module__
