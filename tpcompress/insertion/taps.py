"""Two stand-ins on the outermost model: `forward`, which sees the labels first, and the loss, whose labels shorten.

They are objects and not closures, so that a copy or pickle of the model keeps its own controller.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from tpcompress.insertion.hooks import Controller


class ForwardTap:
    """Stands in for `model.forward`: hands the labels to the stages and ends the call. Same signature."""

    def __init__(self, controller: Controller, previous: Any) -> None:
        self.controller, self.previous = controller, previous
        self.__signature__ = inspect.signature(type(controller.parts.model).forward).replace(
            parameters=list(inspect.signature(type(controller.parts.model).forward).parameters.values())[1:]
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        controller = self.controller
        controller.labels = self.__signature__.bind_partial(*args, **kwargs).arguments.get("labels")
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

    def __call__(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        call = self.controller.call
        if call is not None and call.frame is not None and labels.shape[1] == call.frame.length:
            labels = call.frame.labels(labels)
        for trace in self.controller.traces:
            trace.labels_BN = labels
        return self.base(logits=logits, labels=labels, **kwargs)
