"""YAML files of comparisons, studies and estimator tables: a mapping becomes a dataclass, mistakes become one line."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, TypeVar

from tpcompress.bundled import find_config
from tpcompress.errors import read_yaml
from tpcompress.evaluation.scoring.metrics import find_metric
from tpcompress.evaluation.tasks import Task, create_task

C = TypeVar("C", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys that comparisons, studies and estimator tables share.

    Attributes:
        base: base model: folder, hub id or bundled name.
        out: output directory.
        task: what models are tested on: a name, or `{type: name, ...arguments}`.
        data: chat data to test on, short for `task: {type: chat, data: ...}`.
        image_folder: folder that its relative image paths start from.
        metric: metric of the scores, by name or dotted path; default: that of the task.
        generate: settings with which answers are generated, see `Task`.
        num_images: held-out images of the built-in benchmark.
        seed: seed of these images.
        batch_size: sequences per evaluation batch.
    """

    base: str = "tiny_llava"
    out: str = "runs/bench"
    task: Any = "benchmark"
    data: str | None = None
    image_folder: str | None = None
    metric: str | None = None
    generate: Any = None
    num_images: int = 320
    seed: int = 0
    batch_size: int = 64

    def make_task(self) -> Task:
        """The task. The bare name `benchmark` takes `num_images` and `seed` from the file.

        Raises:
            ValueError: unknown task, or a value that it refuses.
        """
        if self.data is not None and self.task != "benchmark":
            raise ValueError("both data and task are given; write the data inside the task.")
        shared = {"metric": self.metric, "generate": self.generate}
        if self.data is not None:
            return create_task({"type": "chat", "data": self.data, "image_folder": self.image_folder} | shared)
        if self.task == "benchmark":
            return create_task({"type": "benchmark", "num_images": self.num_images, "seed": self.seed} | shared)
        given = {"type": self.task} if isinstance(self.task, str) else self.task
        if not isinstance(given, Mapping):
            return create_task(self.task)
        return create_task(shared | {k: v for k, v in given.items() if v is not None})

    def check_tasks(self) -> None:
        """Make the task, without reading its data.

        Raises:
            ValueError: a wrong task or metric.
        """
        find_metric(self.metric or self.make_task().metric)

    @classmethod
    def parts(cls) -> dict[str, tuple[type, str | None]]:
        """Keys whose entries are dataclasses: their class, and the field that a bare value stands for."""
        return {}

    @classmethod
    def from_file(cls: type[C], path: str) -> C:
        """Read a file, or the bundled recipe of that name.

        Raises:
            FileNotFoundError: no such file.
            ValueError: an unknown or missing key, or a value that is refused.
        """
        values = read_yaml(find_config(path))
        if not isinstance(values, dict):
            keys = ", ".join(f.name for f in fields(cls)[:4])
            raise ValueError(f"{path} is not a mapping; it has keys such as {keys}.")
        if values.get("task", "benchmark") != "benchmark":
            doubled = [name for name in ("num_images", "seed") if name in values]
            if doubled:
                raise ValueError(f"{path}: {', '.join(doubled)} belongs to the benchmark; write it inside task.")
        with _one_line(cls, path):
            for name, (kind, bare) in cls.parts().items():
                entries = values.get(name) or []
                if not isinstance(entries, list):
                    raise ValueError(f"{name} is a list, got {entries!r}; put a `-` before each entry.")
                values[name] = tuple(_part(kind, bare, entry, name) for entry in entries)
            _check_types(cls, values)
            arguments: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
            config = cls(**arguments)
            config.check_tasks()
        return config


def _part(kind: type, bare: str | None, entry: Any, name: str) -> Any:
    """An entry of a list: a mapping of fields, or a bare value."""
    names = [f.name for f in fields(kind)]
    if bare is not None and not (isinstance(entry, Mapping) and bare in entry):
        entry = {bare: entry}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name}: an entry is a mapping with {', '.join(names)}, got {entry!r}.")
    unknown = [str(key) for key in entry if key not in names]
    if unknown:
        raise ValueError(f"{name}: unknown key {', '.join(unknown)}; known keys: {', '.join(names)}.")
    _check_types(kind, entry)
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()})


@contextmanager
def _one_line(kind: type, path: str) -> Iterator[None]:
    """Name the file in every mistake, and the known keys in Python's complaint about an argument."""
    try:
        yield
    except TypeError as error:
        known = ", ".join(f.name for f in fields(kind))
        raise ValueError(f"{path}: {str(error).partition(') ')[2] or error}; known keys: {known}.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_types(kind: type, values: Mapping[str, Any]) -> None:
    """Refuse values of another type than the field: `seed: "0"`, `downsample: "no"`."""
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise ValueError(f"{name} must be {_word(hints[name])}, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(each, arguments[0]) for each in value)
    if origin is dict or hint is dict:
        return isinstance(value, Mapping)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)


def _word(hint: Any) -> str:
    """A type in the words of an error."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, UnionType):
        return " or ".join(_word(each) for each in arguments if each is not NoneType)
    if origin is tuple:
        return "a list, each entry " + _word(arguments[0])
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(hint, "a mapping")
