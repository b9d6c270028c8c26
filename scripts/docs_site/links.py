"""Link check of the built site: relative links, images and anchors resolve, and nothing is loaded from other hosts."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}
"""Attributes that a browser loads by itself; a link in the text is followed by its reader."""


@dataclass
class _Page(HTMLParser):
    """Anchors and references of one page."""

    anchors: set[str] = field(default_factory=set)
    references: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name in ("id", "name"):
                self.anchors.add(value)
            if name in ("href", "src"):
                self.references.append((tag, name, value))


def broken_links(site: Path) -> list[str]:
    """Everything that does not resolve, one line each: `page: target (reason)`."""
    pages = {path.resolve(): _read(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site}: no page was built"]
    found = []
    for path, page in pages.items():
        for tag, name, value in page.references:
            reason = _broken(site.resolve(), path, tag, name, value, pages)
            if reason:
                found.append(f"{path.relative_to(site.resolve())}: {value} ({reason})")
    return found


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page


def _broken(site: Path, path: Path, tag: str, name: str, value: str, pages: dict[Path, _Page]) -> str:
    """Why a reference does not resolve; empty if it does."""
    parts = urlsplit(value)
    if parts.scheme == "data" or value.startswith("javascript:"):
        return ""
    if parts.scheme or parts.netloc:
        canonical = tag == "link" and not value.endswith((".css", ".js", ".png", ".woff2"))
        return "is loaded from another host" if (tag, name) in LOADED and not canonical else ""
    target = path
    if parts.path:
        base = site / parts.path.lstrip("/") if parts.path.startswith("/") else path.parent / unquote(parts.path)
        target = base.resolve()
        if target.is_dir():
            target /= "index.html"
        if not target.is_file():
            return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors and not anchor.startswith("__"):
        return "no such anchor"
    return ""
