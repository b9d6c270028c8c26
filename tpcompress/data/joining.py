"""Join the inputs of several sequences as their processor does, which is learned from a probe.

The probe processes three small conversations apart and as one list: with one image, without images, with two images.
Comparing both tells for every key of the processor along which dimension sequences are joined: per token, per image
(or tile or patch), or per row; what dimensions are padded with; and what stands for a row without images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tpcompress.data.buffers import empty
from tpcompress.data.processing import Media, call
from tpcompress.data.template import Rendered
from tpcompress.errors import first_line

TEXT_KEYS = ("input_ids", "attention_mask", "labels")
_SIZES = ((64, 48), (96, 64), (48, 80))  # width, height of the images of the probe
_FRAMES = 4
Number = int | float


@dataclass
class Joint:
    """How a key is joined over the sequences of a batch.

    Attributes:
        per_row: one entry per sequence, which those without media have, too.
        fill: value that dimensions are padded with.
        absent: value of the entry of a sequence without media (`per_row` only).
    """

    per_row: bool = False
    fill: Number = 0
    absent: Number = 0


@dataclass
class Layout:
    """How the keys of a processor are joined.

    Attributes:
        tokens: further keys with one entry per token, with their fill.
        dtypes: dtypes of these keys.
        media: how other keys are joined.
        structured: keys per token that tell the model more than text does: multimodal positions, attention blocks.
        nested: whether the processor takes images nested by row.
        refused: why the processor takes no conversation of a kind (`image`, `text`, `images`, `video`).
    """

    tokens: dict[str, Number] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    media: dict[str, Joint] = field(default_factory=dict)
    structured: tuple[str, ...] = ()
    nested: bool = True
    refused: dict[str, str] = field(default_factory=dict)

    def join(self, values: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join the media inputs of sequences.

        Args:
            values: media inputs of each sequence; empty for those without media.

        Raises:
            ValueError: a key that the probe did not have.
        """
        joined: dict[str, Tensor] = {}
        for name in {name: None for one in values for name in one}:
            if name not in self.media:
                raise ValueError(f"The processor returned {name}, which it did not on a probe; report this.")
            joined[name] = _joined([one.get(name) for one in values], self.media[name])
        return joined


def learn_layout(processor: Any, name: str, converse: Callable[[dict[str, int]], Rendered]) -> Layout:
    """Learn how the inputs of a processor are joined.

    Args:
        processor: the processor, which can pad.
        name: what to call it in messages.
        converse: function (media counts by kind) -> rendered conversation with so many media.

    Returns:
        the layout.

    Raises:
        ValueError: the processor takes no conversation with an image, or joins a key in no known way.
    """
    layout = Layout()
    first, *others = (Image.fromarray(_noise(height, width)) for width, height in _SIZES)
    kinds = {"image": Media([first]), "text": Media(), "images": Media(others)}
    _learn(layout, processor, name, converse, kinds)
    if "image" in layout.refused:  # GOT-OCR 2 takes one image per conversation, in a flat list
        layout = Layout(nested=False)
        _learn(layout, processor, name, converse, kinds)
    if "image" in layout.refused:
        raise ValueError(f"{name} takes no conversation with an image: {layout.refused['image']}.")
    if getattr(processor, "video_processor", None) is None:
        layout.refused["video"] = f"{name} has no video processor"
        return layout
    try:
        _learn(layout, processor, name, converse, {"video": _video(), "text": Media(), "videos": _video(2)})
    except ValueError as error:
        layout.refused["video"] = str(error)
    return layout


def _learn(
    layout: Layout, processor: Any, name: str, converse: Callable[[dict[str, int]], Rendered],
    kinds: dict[str, Media],
) -> None:  # fmt: skip
    texts: dict[str, str] = {}
    more: dict[str, dict[str, Any]] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for kind, media in kinds.items():
        try:
            rendered = converse(media.counts)
            texts[kind], more[kind] = rendered.text, rendered.more
            apart[kind] = call(processor, [texts[kind]], [media], layout.nested, **_listed([more[kind]]))
        except Exception as error:  # whatever a processor or template raises on a conversation that it does not take
            layout.refused.setdefault(kind, first_line(error)[:200])
    usable = [kind for kind in kinds if kind in apart]
    for kinds_tried in (usable, [kind for kind in usable if kind != "text"]):
        try:
            together = call(
                processor, [texts[kind] for kind in kinds_tried], [kinds[kind] for kind in kinds_tried],
                layout.nested, padding=True, padding_side="right", **_listed([more[kind] for kind in kinds_tried]),
            )  # fmt: skip
        except Exception:  # some processors take no list with a row without images, or no list at all
            continue
        break
    else:
        kinds_tried, together = usable[:1], apart[usable[0]] if usable else {}
    values = [apart[kind] for kind in kinds_tried]
    for key, joint in together.items():
        if all(key in one and one[key].shape == one["input_ids"].shape for one in values) and (
            joint.shape == together["input_ids"].shape
        ):
            _learn_tokens(layout, name, key, [one[key] for one in values], joint)
        elif key not in (*TEXT_KEYS, *layout.media):  # images first, where videos come under the same key
            layout.media[key] = _learn_joint(name, key, [one.get(key) for one in values], joint)
    lost = {key for kind in usable for key in apart[kind]} - set(together)
    if lost:
        raise ValueError(f"{name} returns {', '.join(sorted(lost))} for one conversation but not for a list of them.")


def _learn_tokens(layout: Layout, name: str, key: str, values: list[Tensor], joint: Tensor) -> None:
    if key in TEXT_KEYS:
        return
    lengths, width = [value.shape[1] for value in values], joint.shape[1]
    for row, length in enumerate(lengths):
        if not torch.equal(joint[row, :length], values[row][0]):
            raise ValueError(f"{name} makes other {key} in a batch than for one row, which would be lost.")
    fills = {joint[row, length].item() for row, length in enumerate(lengths) if length < width}
    layout.tokens[key], layout.dtypes[key] = (fills.pop() if fills else 0), joint.dtype
    if any(value.any() for value in values):
        layout.structured = tuple(sorted({*layout.structured, key}))


def _learn_joint(name: str, key: str, values: list[Tensor | None], joint: Tensor) -> Joint:
    """How a key of several sequences becomes their joint one."""
    present = [value for value in values if value is not None]
    entries = sum(len(value) for value in present)
    missing = len(values) - len(present)
    if present and all(value.ndim == joint.ndim for value in present):
        # Without a row without images in the list: one entry for one and for two images alike.
        per_row = len(joint) == entries + missing if missing else len(present) > 1 and entries == len(present)
        for fill in (0, _outside(present, joint)):
            rule = Joint(per_row, fill, 0)
            if per_row and missing:
                gap = next(at for at, value in enumerate(values) if value is None)
                at = sum(len(value) for value in values[:gap] if value is not None)
                rule.absent = joint[at].flatten()[0].item()
            made = _joined(values, rule)
            if made.shape == joint.shape and torch.allclose(made.float(), joint.float(), atol=1e-5, equal_nan=True):
                return rule
    shapes = [None if value is None else tuple(value.shape) for value in values]
    raise ValueError(
        f"{name} joins {key} of shapes {shapes} to {tuple(joint.shape)} in no known way, so that it would be lost; "
        "report this with the family."
    )


def _outside(values: list[Tensor], joint: Tensor) -> Number:
    """The value of the last entry that only padding can have."""
    corner = joint[0][tuple(slice(-1, None) for _ in range(joint.ndim - 1))]
    return corner.flatten()[0].item() if values[0].shape[1:] != joint.shape[1:] and corner.numel() else 0


def _joined(values: Sequence[Tensor | None], rule: Joint) -> Tensor:
    present = [value for value in values if value is not None]
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in present), strict=True)]
    alike = all(list(value.shape[1:]) == shape for value in present)
    if alike and len(present) == 1 and not rule.per_row:
        return present[0]
    total = sum((1 if rule.per_row else 0) if value is None else len(value) for value in values)
    joined = empty((total, *shape), present[0].dtype)
    if not alike:
        joined.fill_(rule.fill)
    cursor = 0
    for value in values:
        if value is None:
            if rule.per_row:
                joined[cursor] = rule.absent
                cursor += 1
            continue
        joined[(slice(cursor, cursor + len(value)), *(slice(size) for size in value.shape[1:]))] = value
        cursor += len(value)
    return joined


def _listed(more: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [one[key] for one in more] for key in more[0]}


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, (*shape, 3), dtype=np.uint8)


def _video(number: int = 1) -> Media:
    from transformers.video_utils import VideoMetadata

    width, height = _SIZES[0]
    about: dict[str, Any] = {
        "total_num_frames": _FRAMES,
        "fps": 1.0,
        "duration": float(_FRAMES),
        "width": width,
        "height": height,
    }
    metadata = [VideoMetadata(**about, frames_indices=list(range(_FRAMES))) for _ in range(number)]
    return Media(videos=[_noise(_FRAMES, height, width) for _ in range(number)], metadata=metadata)
