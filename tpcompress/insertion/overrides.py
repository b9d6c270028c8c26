"""Stand-ins for methods of the model: `forward`, `loss_function`, `_prefill` of `generate`, and deepstack.

They are objects and not closures, so that a copy or pickle of the model refers to its own attachment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompress.insertion.attachment import Attachment, Request
from tpcompress.insertion.encoded import has_pixels
from tpcompress.insertion.shorten.columns import take
from tpcompress.insertion.signatures import unbound_signature


class ForwardOverride:
    """Replaces `model.forward`: opens the request with its labels, and ends it. Same signature."""

    def __init__(self, attachment: Attachment, previous: Any) -> None:
        self.attachment, self.previous = attachment, previous
        self.__signature__ = unbound_signature(type(attachment.parts.model).forward)

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.__signature__.bind_partial(*args, **kwargs).arguments
        # Assisted decoding requests logits from the end of the prompt on: the tokens after it are candidates.
        wanted = arguments.get("logits_to_keep", 0)
        num_candidates = max(0, wanted - 1) if isinstance(wanted, int) else 0
        with self.attachment.requesting(Request(arguments.get("labels"), num_candidates)):
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            model = self.attachment.parts.model
            return type(model).forward(model, *args, **kwargs)


class LossOverride:
    """Replaces `model.loss_function`: labels are shortened like the sequence."""

    def __init__(self, attachment: Attachment, base: Any) -> None:
        self.attachment, self.base = attachment, base

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base(logits, self._shortened(labels), *args, **kwargs)

    @torch.compiler.disable
    def _shortened(self, labels: Tensor) -> Tensor:
        call = self.attachment.call
        if call is not None and call.frame is not None and labels.shape[1] == call.frame.length:
            labels = call.frame.labels(labels)
        for trace in self.attachment.settings.traces:
            trace.labels_BN = labels
        return labels


class PrefillOverride:
    """Replaces `model._prefill` of `generate`: refuses a prefill in chunks, which would prune each chunk by itself."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        kind: Any = type(attachment.parts.model)
        self.__signature__ = unbound_signature(kind._prefill)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.__signature__.bind(*args, **kwargs).arguments
        chunked = arguments["generation_config"].prefill_chunk_size is not None
        if chunked and self.attachment.settings.mode != "off" and has_pixels(arguments["model_kwargs"]):
            raise ValueError(
                "A plan cannot prune images in a chunked prefill, whose stages would see one chunk at a time; leave "
                "prefill_chunk_size out."
            )
        model = self.attachment.parts.model
        kind: Any = type(model)
        return kind._prefill(model, *args, **kwargs)


class DeepstackOverride:
    """Replaces `_deepstack_process` of a text model: features of earlier tower layers are added to retained tokens."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    @torch.compiler.disable
    def __call__(self, hidden_BND: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        call, text = self.attachment.call, self.attachment.parts.language_model
        frame = None if call is None else call.frame
        if frame is None or not call.cuts or hidden_BND.shape[1] == visual_pos_masks.shape[1] == frame.length:  # type: ignore[union-attr]
            return type(text)._deepstack_process(text, hidden_BND, visual_pos_masks, visual_embeds)  # type: ignore[attr-defined,no-any-return]
        B, S = visual_pos_masks.shape
        # As in `locate`: the number of features is known on the host, so no sync counts the True ones.
        order_M = (~visual_pos_masks.reshape(-1)).to(torch.int8).argsort(stable=True)[: len(visual_embeds)]
        dense_MD = hidden_BND.new_zeros(B * S, hidden_BND.shape[-1])
        dense_MD = dense_MD.index_copy(0, order_M, visual_embeds.to(dense_MD.dtype))
        return hidden_BND + take(dense_MD.view(B, S, -1), frame.index_BN, 1)
