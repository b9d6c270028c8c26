"""Stand-ins for methods: `forward` sees the labels first, the loss shortens them, deepstack adds what is left.

They are objects and not closures, so that a copy or pickle of the model keeps its own controller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tpcompress.insertion.encode import unbound_signature
from tpcompress.insertion.shorten.columns import take

if TYPE_CHECKING:
    from tpcompress.insertion.hooks import Controller


class ForwardTap:
    """Stands in for `model.forward`: hands the labels to the stages and ends the call. Same signature."""

    def __init__(self, controller: Controller, previous: Any) -> None:
        self.controller, self.previous = controller, previous
        self.__signature__ = unbound_signature(type(controller.parts.model).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        controller = self.controller
        arguments = self.__signature__.bind_partial(*args, **kwargs).arguments
        controller.labels = arguments.get("labels")
        # Assisted decoding wants logits from the end of the prompt on: what follows are candidates, not prompt.
        wanted = arguments.get("logits_to_keep", 0)
        controller.candidates = max(0, wanted - 1) if isinstance(wanted, int) else 0
        try:
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            model = controller.parts.model
            return type(model).forward(model, *args, **kwargs)
        finally:
            controller.labels = controller.call = None


class ShortenedLoss:
    """Stands in for `model.loss_function`: labels follow the tokens that the last stage left."""

    def __init__(self, controller: Controller, base: Any) -> None:
        self.controller, self.base = controller, base

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = self.controller.call
        if call is not None and call.frame is not None and labels.shape[1] == call.frame.length:
            labels = call.frame.labels(labels)
        for trace in self.controller.traces:
            trace.labels_BN = labels
        return self.base(logits, labels, *args, **kwargs)


class DeepstackTap:
    """Stands in for a text model's `_deepstack_process`: features of earlier tower layers meet what is left."""

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def __call__(self, hidden_BND: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        call, text = self.controller.call, self.controller.parts.language_model
        frame = None if call is None else call.frame
        if frame is None or not call.cuts or hidden_BND.shape[1] == visual_pos_masks.shape[1] == frame.length:  # type: ignore[union-attr]
            return type(text)._deepstack_process(text, hidden_BND, visual_pos_masks, visual_embeds)  # type: ignore[attr-defined,no-any-return]
        B, S = visual_pos_masks.shape
        # As in `locate`: the number of features is known, so nobody need count the True ones.
        order_M = (~visual_pos_masks.reshape(-1)).to(torch.int8).argsort(stable=True)[: len(visual_embeds)]
        dense_MD = hidden_BND.new_zeros(B * S, hidden_BND.shape[-1])
        dense_MD = dense_MD.index_copy(0, order_M, visual_embeds.to(dense_MD.dtype))
        return hidden_BND + take(dense_MD.view(B, S, -1), frame.index_BN, 1)
