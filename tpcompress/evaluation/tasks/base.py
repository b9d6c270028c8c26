"""The interface of a task: its rows, the family of each question, and how answers are collated and scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from PIL import Image
from rich.progress import Progress
from torch import nn

from tpcompress.data.rows import BadRow, open_image
from tpcompress.data.video import VideoSampling
from tpcompress.evaluation.create import argument_names
from tpcompress.evaluation.scoring.batches import Change, Prepared, Rows, check_applies, prepare, prepare_prompts
from tpcompress.evaluation.scoring.evaluate import Watch, evaluate
from tpcompress.evaluation.scoring.generate import Generation, evaluate_by_generation
from tpcompress.evaluation.scoring.metrics import find_metric
from tpcompress.evaluation.scoring.scores import Scores

SHARED = ("metric", "generate", "label")
"""Arguments that every task takes beside its own."""


class Task:
    """What a model is tested on: questions about images, each with a reference answer and a family.

    A subclass sets `name`, takes plain values in `__init__`, keeps them as attributes of the same names, and
    implements `load` and `description`. A row is `{"images": [...], "conversations": [[turn, ...], ...],
    "families": [name per conversation]}`, see `tpcompress.data`; with `references` (a list of right answers per
    conversation) where the last turn is not the only right answer.

    Attributes:
        name: word for it in files (`task: benchmark`, or `task: {type: benchmark, ...}`).
        metric: metric of its scores, by name or dotted path, see `tpcompress.evaluation.scoring.metrics`.
        generate: settings with which answers are generated (`max_new_tokens`, `batch_size`, `stop`); None scores by
            teacher forcing, unless the metric reads text.
        label: name in reports of several tasks.
        video: how videos are sampled.
        left_out: rows that the reader left out when the data was loaded, by reason.
    """

    name: ClassVar[str]
    metric: str = "accuracy"
    generate: Generation | None = None
    label: str | None = None
    video: VideoSampling = VideoSampling()
    left_out: Mapping[str, int] = MappingProxyType({})

    def load(self) -> Rows:
        """Read or draw the rows. Called once."""
        raise NotImplementedError(f"{type(self).__name__} must implement load() -> rows.")

    @property
    def description(self) -> str:
        """The data in a few words, for reports: `the built-in benchmark`."""
        raise NotImplementedError(f"{type(self).__name__} must implement description.")

    def evidence(self) -> list[list[tuple[int, ...]]] | None:
        """For every question of every row, the vision tokens of its only image that it rests on, most needed first.

        None where it is not known. With it, comparisons have a row `oracle`, which keeps these tokens.
        """
        return None

    @property
    def evidence_leaks(self) -> tuple[str, ...]:
        """Families in which the evidence could not be found without the answer."""
        return ()

    def config(self) -> dict[str, Any]:
        """Name and arguments, without the label; `create_task` is the inverse."""
        values = {"type": self.name} | {name: getattr(self, name) for name in argument_names(type(self))}
        if self.metric != type(self).metric:
            values["metric"] = self.metric
        return values if self.generate is None else values | {"generate": self.generate.config()}

    @property
    def title(self) -> str:
        """Its label, or its name."""
        return self.label or self.name

    def generation(self, metric: str | None = None) -> Generation | None:
        """How answers are generated for a metric; None scores by teacher forcing.

        Args:
            metric: default: that of the task.
        """
        if self.generate is None and not find_metric(metric or self.metric).reads_logits:
            return Generation()
        return self.generate

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
            texts = [row["conversations"], row["families"]]
            texts += [row[name] for name in ("references", "tools") if row.get(name)]
            digest.update(json.dumps(texts, ensure_ascii=False).encode())
            for image in row["images"]:
                digest.update(_image_digest(image))
            for video in row.get("videos") or []:
                for part in video if isinstance(video, list) else [video]:
                    digest.update(_image_digest(part))
        return digest.hexdigest()

    def prepare(
        self,
        processor: Any,
        batch_size: int = 64,
        pack: bool = True,
        change: Change | None = None,
        metric: str | None = None,
    ) -> Prepared:
        """Collate all rows once, for testing many models.

        Args:
            processor: processor of the model.
            batch_size: sequences per batch; generation has a batch size of its own.
            pack: all questions about an image in one sequence; False gives each question its own, which plans that
                read the prompt need, and families that cannot pack. Generation never packs.
            change: applied to every row before it is collated, such as `tpcompress.data.blank.blank_images`.
            metric: metric that will be counted; default: that of the task.

        Raises:
            ValueError: no row is usable.
        """
        settings = self.generation(metric)
        if settings is not None:
            size = settings.batch_size
            return prepare_prompts(processor, self.rows, batch_size=size, change=change, video=self.video)
        return prepare(processor, self.rows, batch_size=batch_size, pack=pack, change=change, video=self.video)

    def score(
        self,
        model: nn.Module,
        processor: Any,
        prepared: Prepared | None = None,
        *,
        blank: bool = False,
        watch: Watch | None = None,
        metric: str | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Test a model, pruned as attached.

        Args:
            model: dense, attached or exported.
            processor: processor of the model.
            prepared: output of `prepare`; None collates the rows while scoring.
            blank: replace the images by blank ones; not for prepared rows, which are blank already or not.
            watch: callback for the record of every batch.
            metric: metric of the score; default: that of the task.
            progress: rich progress display to report to.

        Raises:
            ValueError: no row is usable, the metric applies to no question, or the logits are not finite.
        """
        rows = self.rows if prepared is None else prepared
        more: dict[str, Any] = {"blank": blank, "watch": watch, "metric": metric or self.metric, "progress": progress}
        more["video"] = self.video
        settings = self.generation(metric)
        if settings is None:
            scores = evaluate(model, processor, rows, **more)
        else:
            scores = evaluate_by_generation(model, processor, rows, generation=settings, **more)
        check_applies(scores.metric, scores.num_counted, self.rows, self.description)
        return scores


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
