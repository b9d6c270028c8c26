"""Inputs of one prompt, blank images, and media that nothing reads."""

import numpy as np
import pytest
import torch
from chat_rows import ONE, TWO, photo, processor_of, row

from tpcompress.data import BadRow, ChatCollator, PromptCollator, blank_images, prompt_inputs

CLIP = [photo(40, 30, seed) for seed in range(4)]


def test_a_prompt_is_encoded_as_by_the_collator():
    processor = processor_of("qwen2_5_vl")
    images = [photo(40, 30), photo(64, 20)]
    made = prompt_inputs(processor, "<image><image> which is larger?", images, [CLIP])
    sample = row("<image><image> which is larger?", "no", images=tuple(images), videos=(CLIP,))
    expected = PromptCollator(processor)([sample])
    assert set(made) == set(expected) - {"meta"}
    assert all(torch.equal(value, expected[name]) for name, value in made.items())
    with pytest.raises(ValueError, match=r"^The prompt '<image>' is empty"):
        prompt_inputs(processor, "<image>", images[:1])
    with pytest.raises(ValueError, match=r"^The prompt '<image> a' cannot be encoded: image markers: 1 for 2"):
        prompt_inputs(processor, "<image> a", images)


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2_5_vl", "llava_onevision"])
def test_blank_rows_differ_in_their_pixels_only(name):
    collator = ChatCollator(processor_of(name))
    sample = TWO if name == "llava" else row("<video>what?", "no", images=(), videos=(CLIP,))
    for one in (ONE, sample):
        batch, blank = collator([one]), collator([blank_images(one)])
        assert set(batch) == set(blank)
        assert batch["meta"].ids != blank["meta"].ids
        for key in set(batch) - {"meta"}:
            same = torch.equal(batch[key], blank[key])
            assert same == (not key.startswith("pixel_values")), key
            assert blank[key].shape == batch[key].shape
        pixels = next(value for key, value in blank.items() if key.startswith("pixel_values"))
        assert (pixels != 0).any(-1).any(-1).all() or name == "llava_onevision", "no tile of zeros"
    other = row(ONE["conversations"][0][0]["content"], "the ball", images=(photo(40, 30, 9),))
    assert collator([blank_images(other)])["meta"].ids == collator([blank_images(ONE)])["meta"].ids


def test_media_that_nothing_reads_are_bad_rows():
    collator = ChatCollator(processor_of("gemma3"))
    with pytest.raises(BadRow, match=r"^no video support: Gemma3Processor has no video processor$"):
        collator([row("<video>what?", "no", videos=(CLIP,))])
    with pytest.raises(BadRow, match=r"^video markers: 1 for 0 videos$"):
        collator([row("<video>what?", "no")])
    with pytest.raises(BadRow, match=r"^image markers: 1 for 0 images$"):
        collator([row("<image>what?", "no")])


def test_placeholders_in_a_text_are_a_bad_row():
    written = row("<image>what is <|image_pad|>?", "no", images=(photo(40, 30),))
    with pytest.raises(BadRow, match=r"^image markers: the template wrote 2 image tokens for 1$"):
        ChatCollator(processor_of("qwen2_5_vl"))([written])


def test_media_of_a_row_are_processed_once(monkeypatch):
    processor = processor_of("qwen2_5_vl")
    calls = []
    for part in (processor.image_processor, processor.video_processor):
        own = type(part).preprocess
        monkeypatch.setattr(
            type(part), "preprocess", lambda self, *args, own=own, **more: calls.append(1) or own(self, *args, **more)
        )
    sample = row(
        "<image><video> what?", "no", images=(photo(40, 30),), videos=(np.stack([np.asarray(x) for x in CLIP]),)
    )
    sample |= {"conversations": sample["conversations"] * 3, "families": ["a", "b", "c"]}
    collator = ChatCollator(processor)
    calls.clear()
    batch = collator([sample])
    assert len(calls) == 2
    assert len(batch["input_ids"]) == len(batch["image_grid_thw"]) == len(batch["video_grid_thw"]) == 3
