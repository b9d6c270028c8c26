"""Data: chat data sets and the procedural benchmark as rows, and the collators that make batches of them."""

from .chat import load_chat
from .collate import BatchMeta, ChatCollator, PromptCollator, packed_mask
from .rows import IMAGE_MARKER, BadRow, BadRows, GoodRows

__all__ = [
    "IMAGE_MARKER",
    "BadRow",
    "BadRows",
    "BatchMeta",
    "ChatCollator",
    "GoodRows",
    "PromptCollator",
    "load_chat",
    "packed_mask",
]
