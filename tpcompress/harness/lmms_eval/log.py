"""Lines in the log of lmms-eval."""

from __future__ import annotations

import logging
from importlib.util import find_spec


def log(level: str, text: str) -> None:
    """Log a line at `info` or `warning`, with loguru as lmms-eval does, or with the logging of Python without it."""
    if find_spec("loguru") is not None:
        from loguru import logger

        getattr(logger.opt(depth=1), level)("{}", text)
    else:
        getattr(logging.getLogger("tpcompress.harness"), level)("%s", text)
