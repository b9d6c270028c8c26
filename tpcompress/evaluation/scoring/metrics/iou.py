"""IoU@0.5 (RefCOCO): boxes that are read from the answer."""

from __future__ import annotations

from tpcompress.evaluation.scoring.metrics.base import Metric, Reply
from tpcompress.evaluation.scoring.text import box_of

Box = tuple[float, float, float, float]


class BoxIoU(Metric):
    """1 if the first box [x1, y1, x2, y2] of the answer overlaps a reference box with an IoU of at least 0.5, else 0.

    Both are in the same coordinates: write references as the model was taught to. An answer without four numbers is
    wrong.
    """

    name = "iou"
    title = "Boxes with an IoU of at least 0.5"
    applies_to = "a box [x1, y1, x2, y2]"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        said, wanted = box_of(reply.text), [box for text in reply.references if (box := box_of(text)) is not None]
        return float(said is not None and any(overlap(said, box) >= 0.5 for box in wanted)), float(bool(wanted))


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 for an empty one."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    whole = sum(areas) - width * height
    return width * height / whole if whole > 0 and min(areas) > 0 else 0.0
