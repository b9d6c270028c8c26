"""Stand-ins for the encoders: their outputs are unchanged, and what is known of their features is kept beside them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tpcompress.families import Layout, Parts
from tpcompress.insertion.attachment import Attachment
from tpcompress.insertion.encoded import Encoded, recall_features, remember_features
from tpcompress.insertion.signatures import unbound_signature


class EncoderOverride:
    """Replaces `core.get_image_features` or `core.get_video_features`; same signature, same output."""

    def __init__(self, attachment: Attachment, modality: str) -> None:
        self.attachment, self.modality = attachment, modality
        self.__signature__ = unbound_signature(self._plain)

    @property
    def _plain(self) -> Any:
        return getattr(type(self.attachment.parts.core), f"get_{self.modality}_features")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        attachment, parts, tower = self.attachment, self.attachment.parts, self.attachment.tower
        if tower.is_open:  # some models encode videos through their image function
            return self._plain(parts.core, *args, **kwargs)
        with tower.watching(attachment.settings.mode != "off") as seen:
            output = self._plain(parts.core, *args, **kwargs)
        features = getattr(output, "pooler_output", None)
        if features is None:  # a plain tuple, which no call of the model takes
            return output
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        named = {**arguments, **arguments.get("kwargs", {})}
        layouts = lay_out(parts, self.modality, named, features)
        sizes = [layout.placeholders for layout in layouts]
        encoded = Encoded(layouts, tower.values(seen, self.modality, named, sizes))
        remember_features(features, encoded)
        if attachment.call is not None:
            attachment.call.encoded[self.modality] = encoded
        return output


class ExpandOverride:
    """Replaces `model._expand_multimodal_outputs`: what is known of features is repeated with them for beams."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        plain: Any = type(model)
        self.__signature__ = unbound_signature(plain._expand_multimodal_outputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind: Any = type(self.model)
        plain = kind._expand_multimodal_outputs
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        outputs = arguments["mm_encoder_output"]
        known = {}
        for modality, output in outputs.items():
            features = getattr(output, "pooler_output", None)
            if features is not None and (encoded := recall_features(features)) is not None:
                known[modality] = encoded
        # The order is transformers' own: its function expands stand-ins too, which it repeats as objects.
        stand_ins = {
            modality: SimpleNamespace(pooler_output=[torch.empty(len(x), 0) for x in outputs[modality].pooler_output])
            for modality in known
        }
        place = {id(x): i for stand_in in stand_ins.values() for i, x in enumerate(stand_in.pooler_output)}
        stand_ins = plain(self.model, **(arguments | {"mm_encoder_output": stand_ins}))
        outputs = plain(self.model, **arguments)
        for modality, encoded in known.items():
            order = [place[id(x)] for x in stand_ins[modality].pooler_output]
            remember_features(outputs[modality].pooler_output, encoded.reordered(order))
        return outputs


def lay_out(parts: Parts, modality: str, arguments: Mapping[str, Any], features: Any) -> list[Layout]:
    """Layouts of the features of one encoder call, from its arguments by name.

    Raises:
        ValueError: the family's layouts hold another number of tokens than the features.
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
    """Layouts of the images of a call by modality; encodes them for it."""
    found = {}
    for modality in parts.placeholder_ids:
        core: Any = parts.core
        encode = getattr(core, f"get_{modality}_features")
        names = inspect.signature(encode).parameters
        arguments = {k: v for k, v in inputs.items() if k in names}
        if any(k.startswith("pixel_values") for k in arguments):
            with torch.no_grad():
                output = encode(**arguments, return_dict=True)
            encoded = recall_features(output.pooler_output)
            found[modality] = encoded.layouts if encoded else lay_out(parts, modality, arguments, output.pooler_output)
    return found
