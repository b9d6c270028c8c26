"""Chat data of the user: any held-out file that recipes can train on."""

from __future__ import annotations

from tpcompress.data.bad_rows import say_once
from tpcompress.data.chat import load_chat
from tpcompress.data.rows import OnBadRow
from tpcompress.data.video import VideoSampling
from tpcompress.evaluation.scoring.batches import Rows
from tpcompress.evaluation.tasks.base import Task

FAMILY = "all"
"""Family of questions for which the data has none."""


class Chat(Task):
    """Conversations of a file, folder or data set, see `tpcompress.data.load_chat` for the formats.

    A column `families` (one name per conversation of a row) or `family` groups the questions; without them all are one
    family. A column `references` or `answers` holds several right answers (lists of texts), for metrics such as
    `vqa_accuracy` and `anls`. Give rows that the model is not trained on. The default metric suits open answers;
    `exact_match` is for closed ones.

    Args:
        data: file, folder, or name on the hub.
        image_folder: folder that relative image paths start from; default: the folder of the file.
        split: split of a data set that has several.
        num_images: number of rows, from the first; default: all.
        on_bad_row: `skip` leaves out broken rows, `raise` stops at the first.
        check_images: read the header of every image when the data is loaded, to find missing and corrupt ones.
        config_name: config of a data set that has several.
        num_frames, fps: how videos are sampled, see `VideoSampling`.
    """

    name = "chat"
    metric = "token_accuracy"

    def __init__(
        self,
        data: str,
        image_folder: str | None = None,
        split: str = "train",
        num_images: int | None = None,
        on_bad_row: OnBadRow = "skip",
        check_images: bool = True,
        config_name: str | None = None,
        num_frames: int | None = 8,
        fps: float | None = None,
    ) -> None:
        if num_images is not None and (isinstance(num_images, bool) or not isinstance(num_images, int)):
            raise ValueError(f"num_images must be a whole number, got {num_images!r}.")
        if num_images is not None and num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}; leave it out to take all rows.")
        self.data, self.image_folder, self.split = str(data), image_folder, split
        self.num_images, self.on_bad_row, self.check_images = num_images, on_bad_row, check_images
        self.config_name, self.num_frames, self.fps = config_name, num_frames, fps
        self.video = VideoSampling(num_frames, fps)

    def load(self) -> Rows:
        """Read the data; images are decoded when a row is used.

        Raises:
            FileNotFoundError: no such file or image folder.
            ValueError: unknown format, split or columns, or no usable row.
        """
        rows, report = load_chat(
            self.data, self.image_folder, self.split, self.on_bad_row, self.check_images, default_family=FAMILY,
            config_name=self.config_name,
        )  # fmt: skip
        self.left_out = dict(report.counts)
        say_once(str(self.data), report)
        return rows if self.num_images is None else rows.select(range(min(self.num_images, len(rows))))

    @property
    def description(self) -> str:
        """Path or name of the data."""
        return self.data
