"""What an exported model class adds to the stock one: its plan is on from construction, and loading it is strict."""

from __future__ import annotations

import os
from typing import Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedModel

from tpcompress.insertion.attach import CONTROLLER, PRUNERS, attach, plan_of
from tpcompress.insertion.plan import PruningPlan

VARIANT = "tpcompress"
"""Weights are `model.tpcompress.safetensors`: the stock class, called by name, finds none and refuses, too."""

FP32 = PRUNERS
"""Scores stay as precise as they were in training, whatever dtype the rest is loaded in."""


class ExportedModel:
    """Comes before the stock class in the class of an exported model."""

    def __init__(self, config: Any, *args: Any, allow_outside: bool = False, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not getattr(config, "token_pruning", None):
            raise ValueError(
                f"A {type(self).__name__} needs a plan under `token_pruning` in its config.json; without one, use "
                f"{type(self).__mro__[2].__name__}."
            )
        attach(cast(PreTrainedModel, self), PruningPlan.from_dict(config.token_pruning, allow_outside))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but weights that are missing or left over are an error.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            *args: as in transformers.
            output_loading_info: also return what transformers says of the loading.
            **kwargs: as in transformers, and `allow_outside=True` to import pruners from outside tpcompress.

        Raises:
            ValueError: weights are damaged, missing, left over or of another shape; or the plan cannot be read.
            OSError: there are no weights.
        """
        kwargs.setdefault("variant", VARIANT)
        kwargs["ignore_mismatched_sizes"] = True  # to say in one line below what transformers spreads over a table
        loader: Any = super()
        try:
            model, info = loader.from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} are damaged ({error}); copy or export them again."
            ) from None
        odd = {
            "missing": sorted(info["missing_keys"]),
            "left over": sorted(info["unexpected_keys"]),
            "of another shape": sorted(name for name, *_ in info["mismatched_keys"]),
        }
        odd = {what: names for what, names in odd.items() if names}
        if odd:
            found = "; ".join(f"{len(names)} {what}, {names[0]} first" for what, names in odd.items())
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} do not fit its config.json ({found}); "
                f"export the model again."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As in transformers; the plan that is attached now is the one that is written.

        Raises:
            ValueError: the plan was detached: without it the folder would lie about the model.
        """
        if not hasattr(self, CONTROLLER):
            raise ValueError(
                "The plan of this model was detached, and its class does not stand without one; "
                "attach a plan and save again, or save the base checkpoint instead."
            )
        this = cast(PreTrainedModel, self)
        this.config.token_pruning = plan_of(this).to_dict()
        kwargs.setdefault("variant", VARIANT)
        saver: Any = super()
        return saver.save_pretrained(save_directory, **kwargs)
