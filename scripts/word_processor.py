"""Tokenizer and processor of the bases that these scripts build: one token per word, and LLaVA's processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast


def word_tokenizer(
    words: Sequence[str], split: Any, pad: str, bos: str, eos: str, unknown: str, image: str
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `split` is the pre-tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        additional_special_tokens=[image],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def llava_processor(
    tokenizer: PreTrainedTokenizerFast,
    side: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    template: str,
) -> LlavaProcessor:
    """The processor of square images of one size; its image processor does not require torchvision."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(mean),
        image_std=list(std),
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
