"""Tables of `datasets`, with failures in one line and with images and videos undecoded."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets.exceptions import DatasetGenerationError

from tpcompress.hub import offline_if_unreachable

FORMATS = ("arrow", "csv", "json", "parquet", "text", "webdataset")
"""Names that `load_dataset` takes for the format of local files."""

AnyTable = TypeVar("AnyTable", datasets.Dataset, datasets.IterableDataset)


def load_table(source: str | Path, **arguments: Any) -> Any:
    """Call `datasets.load_dataset`, with failures reduced to one line."""
    local = arguments["path"] in FORMATS or Path(arguments["path"]).exists()
    try:
        with nullcontext() if local else offline_if_unreachable():
            return datasets.load_dataset(**arguments)
    except Exception as error:  # the hub client, Arrow and the file system raise unrelated types
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(lines[:2]) if lines[0].startswith("Config name is missing") else lines[0]
        message = f"Cannot load split {arguments.get('split')!r} of {source} with datasets.load_dataset: {reason}"
        hint = "give a file or folder that exists, a hub name that can be reached, or another split."
        hint = "set config_name to one of them." if "configs" in reason else hint
        kind = FileNotFoundError if isinstance(error, FileNotFoundError | ConnectionError) else ValueError
        raise kind(f"{message.rstrip('.')}; {hint}") from error


def undecoded(table: AnyTable) -> AnyTable:
    """A table whose images and videos, nested ones too, stay paths and bytes; nothing is copied."""
    if isinstance(table, datasets.IterableDataset):
        return table.decode(False) if table.features else table
    plain = datasets.Features({name: _undecoded(feature) for name, feature in table.features.items()})
    info = datasets.DatasetInfo(features=plain)
    return datasets.Dataset(table.data, info=info, split=table.split, indices_table=table._indices)


def _undecoded(feature: Any) -> Any:
    if hasattr(feature, "decode_example"):
        return datasets.Value("binary") if not hasattr(feature, "decode") else type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    return feature


def first_reason(error: DatasetGenerationError) -> str:
    """One line for the reason why a table could not be made."""
    return str(error.__cause__ or error).splitlines()[0]
