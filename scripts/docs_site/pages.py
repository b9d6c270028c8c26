"""All pages of the site: guides and READMEs with their links rewritten, and the generated reference."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from docs_site import interface, recipes, reference
from docs_site.kinds import KINDS
from tpcompress.pruners.views import VIEWS

ROOT = Path(__file__).resolve().parents[2]
GUIDES = Path(__file__).parent / "guides"

NOTES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "tpcompress/pruners/README.md": "notes/pruners.md",
    "tpcompress/insertion/README.md": "notes/insertion.md",
    "tpcompress/training/README.md": "notes/training.md",
    "tpcompress/export/README.md": "notes/export.md",
    "tpcompress/harness/README.md": "notes/harness.md",
    "recipes/eval/README.md": "notes/eval.md",
    "recipes/presets/README.md": "notes/presets.md",
    "recipes/studies/README.md": "notes/studies.md",
    "recipes/studies/ESTIMATORS.md": "notes/estimators.md",
    "tpcompress/assets/tiny_llava/README.md": "notes/tiny_llava.md",
}
"""Pages that are files elsewhere in the repository, by path."""

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
IMAGE = re.compile(r"(!\[[^\]]*\])\(([^)\s]+)\)")
CODE_PATH = re.compile(r"(?<![\[`])`([\w./-]+\.(?:md|yaml))`(?![\]`])")

GENERATED = {"<!-- generated: family fields -->": reference.family_fields}
"""Markers in written pages, and what takes their place."""

ORDER = (
    "prune.md", "compress.md", "train.md", "data.md", "own_loop.md", "distributed.md", "export.md", "compare.md",
    "results.md", "troubleshooting.md", "limits.md",
)  # fmt: skip
"""Guides in the order of the navigation; those in `adding/` follow the order of the kinds."""

EXTRA_ADDING = ("view", "recipe")


def sources() -> dict[str, str]:
    """Every written page: path in the repository -> path on the site."""
    guides = {str(path.relative_to(ROOT)): str(path.relative_to(GUIDES)) for path in sorted(GUIDES.rglob("*.md"))}
    return guides | {path: page for path, page in NOTES.items() if (ROOT / path).is_file()}


def all_pages() -> dict[str, str]:
    """Markdown of the whole site by path."""
    written = sources()
    generated = reference.pages() | interface.pages() | {"reference/index.md": _reference_index()}
    known = set(written.values()) | set(generated)
    pages = {}
    for path, page in written.items():
        text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT / path).read_text(), flags=re.S)  # front matter of a model card
        for marker, make in GENERATED.items():
            if marker in text:
                text = text.replace(marker, make())
        pages[page] = _linked(text, path, page, written, known)
    return pages | generated


def navigation(pages: dict[str, str]) -> list[dict]:
    """The tree of the navigation, as the site tool reads it: title -> page or list of such."""
    kinds = [each.one for each in KINDS] + list(EXTRA_ADDING)
    adding = [f"adding/{one}.md" for one in kinds if f"adding/{one}.md" in pages]
    notes = [page for page in NOTES.values() if page.startswith("notes/") and page in pages]
    references: list[Any] = [
        {"Overview": "reference/index.md"},
        {"Python interface": "reference/python.md"},
        {"Command line": "reference/commands.md"},
    ]
    for many in [*(kind.many for kind in KINDS), "views", "recipes"]:
        folder = f"reference/{many}/"
        inside = [page for page in pages if page.startswith(folder) and not page.endswith("/index.md")]
        references.append({many.capitalize(): [f"{folder}index.md", *[{_name(page): page} for page in sorted(inside)]]})
    return [
        {"Home": "index.md"},
        {"Guides": [{title_of(pages[page]): page} for page in ORDER if page in pages]},
        {"Adding": [{title_of(pages[page]): page} for page in adding]},
        {"Reference": references},
        {"Design and measurements": [{title_of(pages[page]): page} for page in notes]},
        {"Changelog": "changelog.md"},
    ]


def title_of(text: str) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", text, flags=re.M)
    if not found:
        raise ValueError(f"A page has no heading: {text[:60]!r}.")
    return found[1]


def _name(page: str) -> str:
    return PurePosixPath(page).stem


def _reference_index() -> str:
    lines = ["# Reference\n", "Generated from the registries, docstrings and recipes of this version.\n"]
    lines += ["- [Python interface](python.md)", "- [Command line](commands.md)"]
    for kind in KINDS:
        lines.append(f"- [{kind.many.capitalize()}]({kind.many}/index.md): {len(kind.members())}. {kind.about}")
    lines.append(f"- [Views](views/index.md): {len(VIEWS)}. A view is what a pruner may read beside the tokens.")
    lines.append(f"- [Recipes](recipes/index.md): {len(recipes.RECIPES)}. Runs, overlays and comparisons.")
    return "\n".join(lines) + "\n"


def _linked(text: str, path: str, page: str, written: dict[str, str], known: set[str]) -> str:
    """Rewrite links between files of the repository to links between pages, outside of code blocks."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if re.match(r"https?:|#|mailto:", target):
            return match[0]
        file, _, anchor = target.partition("#")
        found = _page_of(file, path, page, written, known)
        if found is None:
            return words  # a file of the repository that is no page of the site
        return f"[{words}]({_relative(found, page)}{'#' + anchor if anchor else ''})"

    def image(match: re.Match[str]) -> str:
        file = _normal(PurePosixPath(path).parent / match[2])
        name = f"images/{PurePosixPath(file).name}"
        return f"{match[1]}({_relative(name, page)})"

    def code(match: re.Match[str]) -> str:
        if not (ROOT / match[1]).is_file():
            return match[0]
        found = _page_of(match[1], "README.md", "index.md", written, known)
        return match[0] if found in (None, page) else f"[{match[0]}]({_relative(str(found), page)})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.S | re.M)
    for number in range(0, len(parts), 2):
        parts[number] = IMAGE.sub(image, CODE_PATH.sub(code, LINK.sub(link, parts[number])))
    return "".join(parts)


def _page_of(file: str, path: str, page: str, written: dict[str, str], known: set[str]) -> str | None:
    """The page that a relative target means; None for a file that is not on the site."""
    on_site = _normal(PurePosixPath(page).parent / file)
    in_repository = _normal(PurePosixPath(path).parent / file)
    if in_repository in written:
        return written[in_repository]
    if in_repository.startswith("recipes/") and in_repository.endswith(".yaml"):
        recipe = recipes.recipe_page(in_repository)
        return recipe if recipe in known else None
    if (ROOT / in_repository).exists():
        return None
    if on_site in known:
        return on_site
    raise ValueError(f"{path} links to {file}, which is neither a file nor a page.")


def _normal(path: PurePosixPath) -> str:
    return os.path.normpath(path)


def _relative(target: str, page: str) -> str:
    return os.path.relpath(target, PurePosixPath(page).parent)
