"""Mixin of exported model classes: the plan is attached at construction, and loading is strict."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedModel

from tpcompress.export.contents import check_contents
from tpcompress.export.weights import MAX_SHARD_SIZE, VARIANT, find_weights, has_file, reading, rename_written
from tpcompress.families import family_of
from tpcompress.insertion.attach import PRUNERS, attach_plan, is_attached, plan_of
from tpcompress.insertion.plan import PruningPlan

HUB_ONLY = ("repo_id", "commit_message", "create_pr", "private", "revision", "token")
"""Arguments of `save_pretrained` for `push_to_hub`."""

FP32 = PRUNERS
"""Submodules that stay in float32 whatever the dtype of the rest, as in training."""


class ExportedModel:
    """Precedes the stock class in the bases of an exported model class."""

    def __init__(self, config: Any, *args: Any, allow_outside: bool = False, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not getattr(config, "token_pruning", None):
            raise ValueError(
                f"A {type(self).__name__} needs a plan under `token_pruning` in its config.json; without one, use "
                f"{type(self).__bases__[-1].__name__}."
            )
        plan = stored_plan(config, allow_outside)
        attach_plan(cast(PreTrainedModel, self), plan)
        config.token_pruning = plan.to_dict()

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
            **kwargs: as in transformers, without `variant`; `allow_outside=True` also imports pruners from outside
                tpcompress.

        Raises:
            ValueError: weights are damaged, missing, unexpected or of another shape; the plan cannot be read; or the
                folder holds what `check_contents` refuses.
            OSError: no weights.
        """
        check_source(pretrained_model_name_or_path, kwargs, cls)
        weights = find_weights(pretrained_model_name_or_path, kwargs)
        kwargs["variant"] = VARIANT if weights is None else None
        if weights is not None and not isinstance(kwargs.get("config", ""), str | os.PathLike):
            kwargs["config"] = copy.copy(kwargs["config"])
            kwargs["config"].transformers_weights = weights
        kwargs["ignore_mismatched_sizes"] = True  # reported in one line below instead of in transformers' table
        loader: Any = super()
        try:
            with reading(weights):
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
        vars(model.config).pop("transformers_weights", None)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as transformers does, with the plan that is attached now, and weights under their own name.

        Args:
            save_directory: folder.
            push_to_hub: also upload it.
            **kwargs: as in transformers, without `variant`.

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
        saver: Any = super()
        hub = {name: kwargs.pop(name) for name in HUB_ONLY if name in kwargs}
        kwargs = {"max_shard_size": MAX_SHARD_SIZE} | kwargs
        saver.save_pretrained(save_directory, **kwargs | {"variant": VARIANT})
        if kwargs.get("is_main_process", True):
            rename_written(Path(save_directory))
        if push_to_hub:
            repo = hub.pop("repo_id", Path(save_directory).resolve().name)
            return saver.push_to_hub(repo, **hub)
        return None


def check_source(source: str | os.PathLike[str], options: Mapping[str, Any], cls: type[Any]) -> None:
    """Check a local folder before it is loaded, and that no adapter would be put on the model.

    Args:
        source: local folder or hub id.
        options: arguments of `from_pretrained`.
        cls: the model class.

    Raises:
        ValueError: see `check_contents`, or an adapter beside the model.
    """
    folder = Path(source) / (options.get("subfolder") or "")
    if folder.is_dir():
        check_contents(folder, cls.config_class.model_type, cls.__name__)
    elif has_file(source, "adapter_config.json", options):
        raise ValueError(f"{source} holds an adapter beside the export, which would change it; load a folder without.")


def stored_plan(config: Any, allow_outside: bool) -> PruningPlan:
    """The plan of an exported config.

    Raises:
        ValueError: it cannot be read, or names a pruner from outside that is not allowed.
    """
    values = config.token_pruning
    plan = PruningPlan.from_dict(values, allow_outside)
    tiles = family_of(config).tiles
    if values.get("version", 1) == 1 and plan.scope == "image" and tiles is not None and tiles.apart:
        # A budget held per tile where text stands between tiles, and the model was trained so.
        return replace(plan, scope="tile")
    return plan
