"""The package's model class of exported folders: saving it also writes the code that its plan needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from tpcompress.export.model import ExportedModel
from tpcompress.export.remote_code.folder import remove_code, write_code
from tpcompress.export.remote_code.generate import Code, code_or_reason
from tpcompress.insertion.attach import is_attached, plan_of


class ModelWithCode(ExportedModel):
    """Precedes the stock class in the bases of the package's exported model classes."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as `ExportedModel` does, with the code for `trust_remote_code=True`, if the plan can have it.

        Args:
            save_directory: folder.
            push_to_hub: also upload it.
            **kwargs: as in transformers, without `variant`.

        Raises:
            ValueError: the plan was detached.
        """
        this = cast(PreTrainedModel, self)
        config: Any = this.config
        code = code_or_reason(plan_of(this), config.base_model_type)[0] if is_attached(this) else None
        _name_code(config, code)
        if kwargs.get("is_main_process", True) and is_attached(this):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            remove_code(Path(save_directory))
            if code is not None:
                write_code(Path(save_directory), code)
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)


def _name_code(config: Any, code: Code | None) -> None:
    """Name the code in a config, or no code."""
    if code is not None:
        config.auto_map = dict(code.auto_map)
    elif hasattr(config, "auto_map"):
        del config.auto_map
