"""Scenes of photographs on a real vision encoder, with what each question rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

from torch import nn

from tpcompress.data.photos import load_photos
from tpcompress.data.photos.builder import scene_of
from tpcompress.data.photos.catalogue import SPLITS
from tpcompress.data.photos.questions import Question
from tpcompress.data.photos.scene import Evidence
from tpcompress.data.photos.store import load_photographs
from tpcompress.evaluation.scoring.batches import Rows
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.tasks.base import Task
from tpcompress.evaluation.tasks.photos_features import remembered

Range = Sequence[float]


class Photos(Task):
    """Scenes of photographic cut-outs on photographic backgrounds, in ten closed families of questions.

    `scripts/build_photos.py` fetches the photographs. Test scenes show cut-outs and backgrounds that training scenes
    never show. The scenes are 224 pixels wide, 256 tokens of the base `photo_llava`; in `colour`, `holder` and `dot`
    the answer rests on a dot of about one of them.

    Args:
        num_images: number of scenes.
        seed: series of scenes within the split.
        split: `train`, `validation` or `test`; `train` is for calibration, never for results.
        folder: what the script built; default: $TPCOMPRESS_PHOTOS, else `~/.cache/tpcompress/photos`.
        dot, small, group, large: sizes of what is asked about in pixels, as `[smallest, largest]`, see `Evidence`;
            default: those that the base was trained on.

    Raises:
        ValueError: fewer than one scene, no such split, or a size outside of a scene.
    """

    name = "photos"
    metric = "exact_match"

    def __init__(
        self,
        num_images: int = 320,
        seed: int = 0,
        split: str = "test",
        folder: str | None = None,
        dot: Range | None = None,
        small: Range | None = None,
        group: Range | None = None,
        large: Range | None = None,
    ) -> None:
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"num_images must be a whole number of at least 1, got {num_images!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}.")
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
        self.num_images, self.seed, self.split, self.folder = num_images, seed, split, folder
        self.dot, self.small, self.group, self.large = dot, small, group, large
        _ = self.sizes

    @property
    def sizes(self) -> Evidence:
        """Sizes of what is asked about."""
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(Evidence)}
        for name, value in given.items():
            if value is not None and (not isinstance(value, list | tuple) or len(value) != 2):
                raise ValueError(f"{name} is a range of pixels such as [14, 18], got {value!r}.")
        return Evidence(**{name: tuple(value) for name, value in given.items() if value is not None})

    def load(self) -> Rows:
        """Draw the scenes.

        Raises:
            FileNotFoundError: the photographs were not built; with the command to build them.
        """
        return load_photos(self.split, self.num_images, self.seed, self.folder, self.sizes)

    @property
    def description(self) -> str:
        """`the photo benchmark`."""
        return "the photo benchmark"

    @cached_property
    def questions(self) -> list[list[Question]]:
        """The questions of every scene, with their evidence."""
        photographs = load_photographs(self.split, self.folder)
        numbers = range(self.num_images)
        return [scene_of(photographs, self.split, self.seed, index, self.sizes)[2] for index in numbers]

    def evidence(self) -> list[list[tuple[int, ...]]]:
        """For every question of every scene, the vision tokens that it rests on, the most needed first."""
        return [[question.evidence for question in asked] for asked in self.questions]

    @property
    def evidence_leaks(self) -> tuple[str, ...]:
        """Families in which the evidence could not be found without the answer."""
        return tuple(dict.fromkeys(q.family for asked in self.questions for q in asked if q.leaks))

    def score(self, model: nn.Module, processor: Any, *args: Any, **more: Any) -> Scores:
        """As every task; the tower sees each picture once, whatever number of rules is tested on it."""
        with remembered(model):
            return super().score(model, processor, *args, **more)
