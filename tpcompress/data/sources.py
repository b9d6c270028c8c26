"""What a source of chat data is: files of one split, a folder of `save_to_disk`, or a data set on the hub.

Whole and streamed reading find their files here, so that they read the same rows.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import fsspec

from tpcompress.data.formats import READERS, kind_of
from tpcompress.paths import missing_data

log = logging.getLogger(__name__)

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Words in file and folder names that name a split, as for `datasets.load_dataset`."""
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])")
NUMBERED = re.compile(r"(.+?)-\d{5}-of-\d{5}")
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Source:
    """A source of chat data.

    Attributes:
        given: file, folder, pattern, address or hub name, with `~` expanded.
        split: split that was asked for.
        files: files of that split; empty for a hub name or a folder of `save_to_disk`.
        is_saved: it is a folder of `save_to_disk`.
        config_name: config of a hub data set.
    """

    given: str
    split: str
    files: tuple[str, ...] = ()
    is_saved: bool = False
    config_name: str | None = None

    @property
    def folder(self) -> Path:
        """The folder that relative paths of images start from: that of local files, else the current one."""
        path = Path(self.given)
        if path.is_dir():
            return path
        return Path(self.files[0]).parent if self.files and "://" not in self.files[0] else Path()

    @property
    def kinds(self) -> set[str]:
        """Formats of the files."""
        return {kind_of(name) for name in self.files}


def find_source(source: str | Path, split: str = "train", config_name: str | None = None) -> Source:
    """Find out what a source is.

    Args:
        source: file, folder, pattern with `*` or `{00000..00127}`, URL, or name on the hub.
        split: split of a folder or hub data set.
        config_name: config of a folder or hub data set with several.

    Raises:
        FileNotFoundError: there are no such files, or one of a numbered series is missing.
        ValueError: the format, split or config is unknown.
    """
    address = "://" in str(source)
    given = str(source) if address else str(Path(source).expanduser())
    path, found = Path(given), Source(given, split, config_name=config_name)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return replace(found, is_saved=True)
        return replace(found, files=tuple(_files_of_folder(path, split.partition("[")[0], config_name)))
    if kind_of(given) or path.is_file() or address or "*" in given:
        if not kind_of(given):
            raise ValueError(f"Cannot read {given}: supported are {_known()} files; convert it to one.")
        if split.partition("[")[0] != "train":
            raise ValueError(f"{given} has no split {split!r}: it is one file or pattern; give that of the split.")
        if config_name is not None:
            raise ValueError(f"{given} has no config {config_name!r}: it is one file or pattern; give its folder.")
        return replace(found, files=tuple(_files_of_pattern(given)))
    if path.is_absolute() or str(source).startswith((".", "~")):
        raise missing_data(source)
    return found


def load_saved(source: Source) -> datasets.Dataset:
    """Open the split of a folder of `save_to_disk`.

    Raises:
        ValueError: there is no such split.
    """
    saved = datasets.load_from_disk(source.given)
    if isinstance(saved, datasets.Dataset):
        if source.split not in ("train", str(saved.split)):
            raise ValueError(f"{source.given} has no split {source.split!r}: it was saved as one data set.")
        return saved
    if source.split not in saved:
        raise ValueError(f"{source.given} has no split {source.split!r}; it has {', '.join(saved)}.")
    return saved[source.split]


def _known() -> str:
    *most, last = READERS
    return f"{', '.join(most)} and {last}"


def _files_of_folder(folder: Path, split: str, config_name: str | None) -> list[str]:
    """The files of a split of a folder."""
    if config_name is not None or _has_configs(folder):
        splits = _splits_of_config(folder, config_name)
    else:
        splits = _splits_by_name(folder)
    if split not in splits:
        raise ValueError(f"Folder {folder} has no split {split!r}; it has {', '.join(sorted(splits))}.")
    files = splits[split]
    kinds = sorted({kind_of(name) or Path(name).suffix for name in files})
    if len(kinds) > 1 or not kind_of(files[0]):
        raise ValueError(
            f"Folder {folder} holds files of the formats {', '.join(kinds)}; name the files with a pattern, such as "
            f"{folder}/*{kinds[0]}."
        )
    return files


def _splits_by_name(folder: Path) -> dict[str, list[str]]:
    """The files of every split of a folder, by words in their names; files without such a word are for training."""
    splits: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in inside.parts)
        if kind_of(path.name) and path.is_file() and not hidden and path.name not in NO_DATA:
            splits.setdefault(_split_of(inside.parts), []).append(str(path))
    if not splits:
        raise ValueError(f"Folder {folder} holds no {_known()} files; name the files, or another folder.")
    unnamed = splits.pop("", [])
    if unnamed and "train" in splits:
        log.warning("%s is not read: %s names its training files.", ", ".join(unnamed[:3]), folder)
    elif unnamed:
        splits["train"] = unnamed
    return splits


def _split_of(parts: Iterable[str]) -> str:
    """The split that a path names: by its file name, else by the innermost folder; empty for none."""
    for part in reversed(list(parts)):
        if numbered := NUMBERED.match(part):
            word = SPLIT_WORD.search(numbered[1].lower())
            return SPLIT_WORDS[word[1]] if word else numbered[1]
        if word := SPLIT_WORD.search(part.lower()):
            return SPLIT_WORDS[word[1]]
    return ""


def _has_configs(folder: Path) -> bool:
    """Whether the README of a folder declares configs."""
    readme = folder / "README.md"
    header = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return header.startswith("---") and "\nconfigs:" in header[: header.find("\n---", 3)]


def _splits_of_config(folder: Path, config_name: str | None) -> dict[str, list[str]]:
    """The files of every split of a config, as `datasets` finds them."""
    names = datasets.get_dataset_config_names(str(folder))
    if config_name is None and len(names) > 1:
        raise ValueError(f"{folder} has the configs {', '.join(names)}; set config_name to one of them.")
    if config_name is not None and config_name not in names:
        raise ValueError(f"{folder} has no config {config_name!r}; it has {', '.join(names)}.")
    files = datasets.load_dataset_builder(str(folder), name=config_name).config.data_files or {}
    return {str(split): [str(name) for name in entries] for split, entries in files.items()}


def _files_of_pattern(source: str) -> list[str]:
    """The files that a path, URL or pattern matches, in order."""
    names = [expanded for part in _expand(source) for expanded in (_glob(part) if "*" in part else [part])]
    if not names:
        raise FileNotFoundError(f"No files match {source}; give another pattern.")
    missing = [name for name in names if "://" not in name and not Path(name).is_file()]
    if missing:
        if len(names) == 1:
            raise missing_data(missing[0])
        of = f"; it is one of the {len(names)} files of {source}"
        raise FileNotFoundError(f"No file or folder {missing[0]}{of}. Give files that exist.")
    return names


def _expand(source: str) -> list[str]:
    """Expand ranges such as `{08..11}`."""
    found = RANGE.search(source)
    if found is None:
        return [source]
    first, last = found.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [name for n in numbers for name in _expand(source[: found.start()] + n + source[found.end() :])]


def _glob(pattern: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(pattern)
    found = sorted(system.glob(path))
    return [system.unstrip_protocol(name) for name in found] if "://" in pattern else found
