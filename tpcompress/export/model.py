"""Mixin of exported model classes: the plan is attached at construction, and loading is strict."""

from __future__ import annotations

import os
from typing import Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedModel

from tpcompress.insertion.attach import PRUNERS, attach, is_attached, plan_of
from tpcompress.insertion.plan import PruningPlan

VARIANT = "tpcompress"
"""Weight files are `model.tpcompress.safetensors`, which the stock class does not find, so that it fails to load."""

FP32 = PRUNERS
"""Submodules that stay in float32 whatever the dtype of the rest, as in training."""


class ExportedModel:
    """Precedes the stock class in the bases of an exported model class."""

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
        """Load as transformers does, except that missing or unexpected weights are an error.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            *args: as in transformers.
            output_loading_info: also return transformers' loading info.
            **kwargs: as in transformers; `allow_outside=True` also imports pruners from outside tpcompress.

        Raises:
            ValueError: weights are damaged, missing, unexpected or of another shape; or the plan cannot be read.
            OSError: no weights.
        """
        kwargs.setdefault("variant", VARIANT)
        kwargs["ignore_mismatched_sizes"] = True  # reported in one line below instead of in transformers' table
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
            "unexpected": sorted(info["unexpected_keys"]),
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
        """Save as transformers does, with the plan that is attached now.

        Raises:
            ValueError: the plan was detached, so that the folder would not describe the model.
        """
        this = cast(PreTrainedModel, self)
        if not is_attached(this):
            raise ValueError(
                "The plan of this model was detached, but its class requires one; "
                "attach a plan and save again, or save the base checkpoint instead."
            )
        this.config.token_pruning = plan_of(this).to_dict()
        kwargs.setdefault("variant", VARIANT)
        saver: Any = super()
        return saver.save_pretrained(save_directory, **kwargs)
