"""The Python files that an export carries for `trust_remote_code=True`, generated from the package's own sources.

source.py    a module as definitions      closure.py   what some names need      left_out.py  what never goes along
writing.py   text of a generated file     generate.py  the files of a plan       folder.py    writes and checks them
"""

from tpcompress.export.remote_code.closure import CannotCarryCode
from tpcompress.export.remote_code.generate import ENTRY, Code, code_of, code_or_reason

__all__ = ["ENTRY", "CannotCarryCode", "Code", "code_of", "code_or_reason"]
