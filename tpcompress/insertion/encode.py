"""Encoder outputs know how their tokens lie: `generate` encodes images before the prefill and drops their sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tpcompress.families import Layout, Parts
from tpcompress.insertion.views.tower import TowerValues

if TYPE_CHECKING:
    from tpcompress.insertion.hooks import Controller

NOTE = "_tpcompress_encoded"
"""Attribute of an encoder's output that carries its `Encoded`."""


@dataclass
class Encoded:
    """What is known of one call of an encoder.

    Attributes:
        layouts: one per feature of its `pooler_output`.
        tower: what pruners see of the vision tower, feature by feature.
    """

    layouts: list[Layout]
    tower: TowerValues = field(default_factory=dict)

    def reordered(self, index: list[int]) -> Encoded:
        """The same features in another order, some perhaps several times (beams)."""
        tower = {key: [values[i] for i in index] for key, values in self.tower.items()}
        return Encoded([self.layouts[i] for i in index], tower)


class EncoderTap:
    """Stands in for `core.get_image_features` or `core.get_video_features`; same signature, same answer."""

    def __init__(self, controller: Controller, modality: str) -> None:
        self.controller, self.modality = controller, modality
        self.__signature__ = unbound_signature(self._plain)

    @property
    def _plain(self) -> Any:
        return getattr(type(self.controller.parts.core), f"get_{self.modality}_features")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parts, outermost, tower = self.controller.parts, not self.controller.encoding, self.controller.tower
        self.controller.encoding = True
        try:
            with tower.watching(outermost and self.controller.mode != "off") as seen:
                output = self._plain(parts.core, *args, **kwargs)
        finally:
            self.controller.encoding = not outermost
        features = getattr(output, "pooler_output", None)
        # Some models encode videos through their image function; a plain tuple is only the caller's own business.
        if not outermost or features is None:
            return output
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        named = {**arguments, **arguments.get("kwargs", {})}
        layouts = lay_out(parts, self.modality, named, features)
        sizes = [layout.placeholders for layout in layouts]
        note = Encoded(layouts, tower.values(seen, self.modality, named, sizes))
        setattr(output, NOTE, note)
        if self.controller.call is not None:
            self.controller.call.encoded[self.modality] = note
        return output


class ExpandTap:
    """Stands in for `model._expand_multimodal_outputs`: layouts are repeated with the features of their beams."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        plain: Any = type(model)
        self.__signature__ = unbound_signature(plain._expand_multimodal_outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind: Any = type(self.model)
        plain = kind._expand_multimodal_outputs
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        outputs = arguments["mm_encoder_output"]
        notes = {m: getattr(output, NOTE) for m, output in outputs.items() if hasattr(output, NOTE)}
        # The order is transformers' own: its function is asked to expand stand-ins, which it repeats as objects.
        stand_ins = {
            modality: SimpleNamespace(pooler_output=[torch.empty(len(x), 0) for x in outputs[modality].pooler_output])
            for modality in notes
        }
        place = {id(x): i for stand_in in stand_ins.values() for i, x in enumerate(stand_in.pooler_output)}
        stand_ins = plain(self.model, **(arguments | {"mm_encoder_output": stand_ins}))
        outputs = plain(self.model, **arguments)
        for modality, note in notes.items():
            order = [place[id(x)] for x in stand_ins[modality].pooler_output]
            setattr(outputs[modality], NOTE, note.reordered(order))
        return outputs


def unbound_signature(function: Any) -> inspect.Signature:
    """Signature of a method without its `self`."""
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def lay_out(parts: Parts, modality: str, arguments: Mapping[str, Any], features: Any) -> list[Layout]:
    """Layouts of the features of one encoder call, from its arguments by name.

    Raises:
        ValueError: the family's layouts do not hold as many tokens as the features.
    """
    sizes = [x.numel() // x.shape[-1] for x in features]
    family = parts.family.layouts(modality)
    assert family is not None
    layouts = family(parts.model.config, arguments, sizes)
    if [layout.placeholders for layout in layouts] != sizes:
        raise ValueError(
            f"{parts.family.name} lays out {[layout.placeholders for layout in layouts]} tokens, but its encoder made "
            f"{sizes}; please report this model's config and the sizes of the images."
        )
    return layouts


def layouts_of(parts: Parts, inputs: Mapping[str, Any]) -> dict[str, list[Layout]]:
    """Encode the images of a call only to see how their tokens lie, by modality."""
    found = {}
    for modality in parts.placeholder_ids:
        core: Any = parts.core
        encode = getattr(core, f"get_{modality}_features")
        names = inspect.signature(encode).parameters
        arguments = {k: v for k, v in inputs.items() if k in names}
        if any(k.startswith("pixel_values") for k in arguments):
            with torch.no_grad():
                output = encode(**arguments, return_dict=True)
            note = getattr(output, NOTE, None)
            found[modality] = note.layouts if note else lay_out(parts, modality, arguments, output.pooler_output)
    return found


def given_notes(inputs: Mapping[str, Any]) -> dict[str, Encoded]:
    """Notes of features that were encoded before the call.

    Raises:
        ValueError: features without a note.
    """
    outputs = {m: output for m, output in (inputs.get("mm_encoder_outputs") or {}).items() if output is not None}
    for modality, output in outputs.items():
        if not hasattr(output, NOTE):
            raise ValueError(
                f"The {modality} features of this call do not say how they lie: they were cut by a chunked prefill, or "
                f"made before the plan was attached. Leave prefill_chunk_size out, or call get_{modality}_features of "
                f"the attached model."
            )
    return {modality: getattr(output, NOTE) for modality, output in outputs.items()}


def has_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether a call brings images or videos, encoded or not."""
    if any(output is not None for output in (inputs.get("mm_encoder_outputs") or {}).values()):
        return True
    pixels = (value for name, value in inputs.items() if name.startswith("pixel_values"))
    return any(value is not None and len(value) > 0 for value in pixels)
