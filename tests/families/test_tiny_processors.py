"""The tiny folders of all families: loaded by the Auto classes, with processors whose batches the models run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from support import family_folder
from transformers import AutoModelForImageTextToText, AutoProcessor

from tpcompress.families import list_families

SIZES = ((40, 30), (64, 20), (90, 90))


def turns(sizes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": Image.effect_noise(size, 80).convert("RGB")} for size in sizes]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "what is red?"}]}]


@pytest.mark.parametrize("name", [name for name, family in list_families().items() if family.tiny.processor])
def test_a_tiny_folder_is_loaded_and_runs(name: str) -> None:
    processor = AutoProcessor.from_pretrained(family_folder(name))
    model = AutoModelForImageTextToText.from_pretrained(family_folder(name)).eval()
    assert len(processor.tokenizer) == model.config.get_text_config().vocab_size
    for samples in (SIZES[:1], SIZES[:2]), ((), SIZES[1:2]):
        out = processor.apply_chat_template(
            [turns(sizes) for sizes in samples], tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True},
        )  # fmt: skip
        with torch.no_grad():
            assert model(**out).logits.isfinite().all()
    words = "the red\n\nball: 42!"
    assert processor.tokenizer.decode(processor.tokenizer(words, add_special_tokens=False)["input_ids"]) == words
