"""Data sets as rows (`chat`, `stream`, `benchmark`) and the collators that turn rows into batches (`collate`)."""

from tpcompress.data.blank import blank_images
from tpcompress.data.chat import load_chat
from tpcompress.data.collate import BatchMeta, ChatCollator, PromptCollator
from tpcompress.data.packing import packed_mask
from tpcompress.data.prompts import prompt_inputs
from tpcompress.data.rows import IMAGE_MARKER, BadRow, BadRows, GoodRows

__all__ = [
    "IMAGE_MARKER",
    "BadRow",
    "BadRows",
    "BatchMeta",
    "ChatCollator",
    "GoodRows",
    "PromptCollator",
    "blank_images",
    "load_chat",
    "packed_mask",
    "prompt_inputs",
]
