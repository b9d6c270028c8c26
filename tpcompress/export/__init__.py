"""From an attached model to a folder that cannot lose its pruner, and back. See README.md in this folder."""

from tpcompress.export.bake import export
from tpcompress.export.load import load, load_processor
from tpcompress.export.registry import register_configs
from tpcompress.export.verify import VerifyReport, verify, verify_in_fresh_process

__all__ = ["VerifyReport", "export", "load", "load_processor", "verify", "verify_in_fresh_process"]

register_configs()
