"""The tiny folders of all families: loaded by the Auto classes, with processors whose batches the models run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from support import family_folder, main_families_first
from transformers import AutoModelForImageTextToText, AutoProcessor

SIZES = ((40, 30), (64, 20), (90, 90))


def rows(processor: Any, samples: tuple[tuple[tuple[int, int], ...], ...]) -> Any:
    """A batch of one question each, with images of these sizes."""
    images = [[Image.effect_noise(size, 80).convert("RGB") for size in sizes] for sizes in samples]
    if processor.chat_template is None:
        text = ["<image>" * len(sample) + "what is red?" for sample in images]
        return processor(text=text, images=images, return_tensors="pt", padding=True)
    parts = [[{"type": "image", "image": image} for image in sample] for sample in images]
    chats = [[{"role": "user", "content": [*own, {"type": "text", "text": "what is red?"}]}] for own in parts]
    if type(processor).__name__ == "GotOcr2Processor":  # its apply_chat_template refuses images
        text = processor.apply_chat_template(chats, tokenize=False)
        return processor(text=text, images=sum(images, []), return_tensors="pt", padding=True)
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )


@pytest.mark.parametrize("name", main_families_first())
def test_a_tiny_folder_is_loaded_and_runs(name: str) -> None:
    processor = AutoProcessor.from_pretrained(family_folder(name))
    model = AutoModelForImageTextToText.from_pretrained(family_folder(name)).eval()
    vocabulary = model.config.get_text_config().vocab_size
    # PaliGemma's processor adds tokens for places and shapes.
    assert len(processor.tokenizer) == vocabulary + 1152 * (name == "paligemma")
    for samples in (SIZES[:1], SIZES[:1] if name == "got_ocr2" else SIZES[:2]), (SIZES[1:2], SIZES[2:]):
        out = rows(processor, samples)
        with torch.no_grad():
            assert model(**out).logits.isfinite().all()
    words = "the red\n\nball: 42!"
    assert processor.tokenizer.decode(processor.tokenizer(words, add_special_tokens=False)["input_ids"]) == words
