"""The interface of a task: its rows, the family of each question, and how answers are collated and scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import nn

from tpcompress.data.rows import BadRow, open_image
from tpcompress.evaluation.create import argument_names
from tpcompress.evaluation.scoring.evaluate import Prepared, Rows, Watch, evaluate, prepare
from tpcompress.evaluation.scoring.scores import Scores


class Task:
    """What a model is tested on: questions about images, each with a reference answer and a family.

    A subclass sets `name`, takes plain values in `__init__`, keeps them as attributes of the same names, and
    implements `load` and `description`. A row is `{"images": [...], "conversations": [[turn, ...], ...],
    "families": [name per conversation]}`, see `tpcompress.data`.

    Attributes:
        name: word for it in files (`task: benchmark`, or `task: {type: benchmark, ...}`).
        metric: default metric, see `tpcompress.evaluation.scoring.metrics`.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "accuracy"

    def load(self) -> Rows:
        """Read or draw the rows. Called once."""
        raise NotImplementedError(f"{type(self).__name__} must implement load() -> rows.")

    @property
    def description(self) -> str:
        """The data in a few words, for reports: `the built-in benchmark`."""
        raise NotImplementedError(f"{type(self).__name__} must implement description.")

    def config(self) -> dict[str, Any]:
        """Name and arguments; `create_task` is the inverse."""
        return {"type": self.name} | {name: getattr(self, name) for name in argument_names(type(self))}

    @cached_property
    def rows(self) -> Rows:
        """The rows, loaded on first use."""
        return self.load()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content of all rows: images, turns and families. The same data elsewhere has the same one."""
        digest = hashlib.sha256()
        for index in range(len(self.rows)):
            row = self.rows[index]
            digest.update(json.dumps([row["conversations"], row["families"]], ensure_ascii=False).encode())
            for image in row["images"]:
                digest.update(_image_digest(image))
        return digest.hexdigest()

    def prepare(self, processor: Any, batch_size: int = 64, pack: bool = True) -> Prepared:
        """Collate all rows once, for testing many models.

        Args:
            processor: processor of the model.
            batch_size: sequences per batch.
            pack: all questions about an image in one sequence; False gives each question its own, which plans that
                read the prompt need.

        Raises:
            ValueError: no row is usable.
        """
        return prepare(processor, self.rows, batch_size=batch_size, pack=pack)

    def score(
        self,
        model: nn.Module,
        processor: Any,
        prepared: Prepared | None = None,
        *,
        blank: bool = False,
        watch: Watch | None = None,
        metric: str | None = None,
    ) -> Scores:
        """Test a model, pruned as attached.

        Args:
            model: dense, attached or exported.
            processor: processor of the model.
            prepared: output of `prepare`; None collates the rows while scoring.
            blank: replace the images by their mean: the blank baseline.
            watch: callback for the record of every batch.
            metric: metric of the score; default: that of the task.

        Raises:
            ValueError: no row is usable, or the logits are not finite.
        """
        rows = self.rows if prepared is None else prepared
        return evaluate(model, processor, rows, blank=blank, watch=watch, metric=metric or self.metric)


def _image_digest(image: Any) -> bytes:
    """Hash of an image's file or pixels; of the reason, for one that cannot be read."""
    try:
        if isinstance(image, str | Path):
            with Path(image).open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        if isinstance(image, Mapping) and image.get("bytes") is not None:
            return hashlib.sha256(image["bytes"]).digest()
        pixels: Image.Image = open_image(image)
        return hashlib.sha256(f"{pixels.mode} {pixels.size}".encode() + pixels.tobytes()).digest()
    except (OSError, BadRow) as error:
        return f"unreadable: {type(error).__name__}".encode()
