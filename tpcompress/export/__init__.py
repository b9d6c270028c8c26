"""Export of an attached model to a folder that loads only with its pruner, loading, and verification (see README.md).

The package itself can be called: `tpcompress.export(model, processor, out)` is `tpcompress.export.bake.export`, and
`tpcompress.export.card` stays a module.
"""

import sys
from types import ModuleType

from tpcompress.export.bake import export, save_pretrained
from tpcompress.export.loader import load, load_processor
from tpcompress.export.registry import register_configs
from tpcompress.export.replay import VerifyReport
from tpcompress.export.verifier import verify, verify_in_fresh_process

__all__ = [
    "VerifyReport", "export", "load", "load_processor", "save_pretrained", "verify", "verify_in_fresh_process",
]  # fmt: skip


class _CallablePackage(ModuleType):
    """The package, which forwards calls to `export`."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _CallablePackage
register_configs()
