"""The license of a base model, from the front matter of its own card, for the card of its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

KEYS = ("license", "license_name", "license_link")


def license_of(name: str | None) -> dict[str, str]:
    """The license fields of a base's README.md: in its folder, or in the cache of the hub; empty where there is none.

    Args:
        name: folder or hub id.
    """
    if not name:
        return {}
    path = Path(name) / "README.md"
    if not Path(name).is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(name, "README.md")
        except HFValidationError:  # a folder that is gone
            return {}
        if not isinstance(found, str):
            return {}
        path = Path(found)
    if not path.is_file():
        return {}
    _, _, rest = path.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        values: Any = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    fields = values if isinstance(values, dict) else {}
    return {key: fields[key] for key in KEYS if isinstance(fields.get(key), str)}
