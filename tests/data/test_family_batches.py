"""Batches of every family: exactly what its processor returns, for training and for generation.

The processors are the real classes with tiny sizes (`Tiny.processor`); the reference is `apply_chat_template` of the
processor, called on all conversations of the batch at once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chat_rows import ONE, TURNS, TWO, UNMARKED, WORDS, Batch, model_of, photo, processor_of, row, tensors
from support import MAIN_FAMILIES, main_families_first

from tpcompress.data import ChatCollator, PromptCollator
from tpcompress.data.video import VideoSampling, open_video
from tpcompress.families import list_families

main_families = pytest.mark.parametrize("name", main_families_first())

NO_TEMPLATE = ("paligemma",)

FLAT = ("got_ocr2",)
"""Families whose `apply_chat_template` refuses images: the processor takes no nested lists."""


def rows_of(name: str) -> list[Batch]:
    """Every kind of row that the processor of a family takes."""
    others = {"images": TWO, "text": WORDS, "turns": TURNS}
    return [ONE, UNMARKED, *(others[kind] for kind in others if kind in list_families()[name].takes)]


def chat_of(one: Batch, end: str) -> list[dict[str, Any]]:
    """A row as conversation for `apply_chat_template`, written independently of the collators.

    Args:
        one: the row.
        end: token that the template does not write after answers.
    """
    images = [{"type": "image", "image": image} for image in one["images"]]
    videos = [{"type": "video", "video": video} for video in one["videos"]]
    chat = []
    for message in one["conversations"][0]:
        text = message["content"].replace("<image>", "").replace("<video>", "").lstrip("\n")
        text += end if message["role"] == "assistant" else ""
        media = images + videos if message["role"] == "user" else []
        images, videos = (images, videos) if message["role"] == "system" else ([], [])
        chat.append({"role": message["role"], "content": [*media, {"type": "text", "text": text}]})
    return chat


def reference(name: str, rows: list[Batch], prompt: bool, end: str = "", **more: Any) -> Batch:
    """What the processor of a family returns for these rows."""
    processor = processor_of(name)
    more |= {"padding": True, "padding_side": "left" if prompt else "right"}
    if name in NO_TEMPLATE:
        texts = [one["conversations"][0][0]["content"].replace("<image>", "").strip() for one in rows]
        answers = {} if prompt else {"suffix": [one["conversations"][0][1]["content"] for one in rows]}
        texts = [processor.image_token * len(one["images"]) + text for one, text in zip(rows, texts, strict=True)]
        return processor(text=texts, images=[one["images"] for one in rows], return_tensors="pt", **answers, **more)
    chats = [chat_of(one, end) for one in rows]
    chats = [chat[:-1] for chat in chats] if prompt else chats
    if name in FLAT:
        texts = processor.apply_chat_template(chats, add_generation_prompt=prompt)
        return processor(text=texts, images=[one["images"][0] for one in rows], return_tensors="pt", **more)
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=prompt, processor_kwargs=more
    )


def assert_equal(made: Batch, expected: Batch) -> None:
    assert set(made) == set(expected)
    for key, value in expected.items():
        assert made[key].dtype == value.dtype, key
        assert torch.equal(made[key], value), key


def logits(name: str, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model_of(name)(**batch).logits


def check(name: str, rows: list[Batch], prompt: bool, **more: Any) -> Batch:
    """Compare the batch of a collator with the processor's own, key by key and by the logits of the model."""
    collator = (PromptCollator if prompt else ChatCollator)(processor_of(name))
    batch = collator(rows)
    expected = reference(name, rows, prompt, collator.encoder.appended_end, **more)
    assert_equal(tensors(batch), tensors(expected))
    torch.testing.assert_close(logits(name, tensors(batch)), logits(name, tensors(expected)), atol=1e-5, rtol=0)
    return batch


@main_families
def test_a_batch_of_every_kind_of_row_is_the_processors(name: str) -> None:
    batch = check(name, rows_of(name), prompt=False)
    processor = processor_of(name)
    for labels, one in zip(batch["labels"], rows_of(name), strict=True):
        answers = [message["content"] for message in one["conversations"][0] if message["role"] == "assistant"]
        learned = processor.tokenizer.decode(labels[labels != -100], skip_special_tokens=True)
        assert [learned.count(answer) for answer in answers] == [1] * len(answers)
        assert len(learned.replace("\n", "").strip()) <= len("".join(answers)) + 2 * len(answers)


@main_families
def test_every_row_alone_is_the_processors(name: str) -> None:
    for one in rows_of(name):
        check(name, [one], prompt=False)


@main_families
def test_prompts_are_the_processors(name: str) -> None:
    check(name, rows_of(name), prompt=True)
    check(name, [ONE], prompt=True)


WITH_VIDEO = [
    pytest.param(name, marks=() if name in MAIN_FAMILIES else pytest.mark.slow)
    for name, family in list_families().items()
    if family.video_layouts is not None or name in ("internvl", "smolvlm")
]


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_videos_are_the_processors(name: str) -> None:
    clips = [[photo(40, 30, seed) for seed in range(first, first + 4)] for first in (5, 9)]
    opened = [open_video(clip, VideoSampling()) for clip in clips]
    rows = [
        row("<video>\nwhat moves?", "a door", videos=(clips[0],)),
        row("what else?", "nothing", videos=(clips[1],)),
    ]
    arrays = [one | {"videos": [frames]} for one, (frames, _) in zip(rows, opened, strict=True)]
    for prompt in (False, True):
        collator = (PromptCollator if prompt else ChatCollator)(processor_of(name))
        for chosen in ([0], [0, 1]):
            more = {"video_metadata": [opened[at][1] for at in chosen], "do_sample_frames": False}
            batch = collator([rows[at] for at in chosen])
            expected = reference(name, [arrays[at] for at in chosen], prompt, collator.encoder.appended_end, **more)
            assert_equal(tensors(batch), tensors(expected))
            logits(name, tensors(batch))


@main_families
def test_images_decide_what_the_model_predicts(name: str) -> None:
    """A comparison of logits would hold for a model that reads no image, too."""
    collator = ChatCollator(processor_of(name))
    other = ONE | {"images": [photo(40, 30, 7)]}
    first, second = (tensors(collator([one])) for one in (ONE, other))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert (logits(name, first) - logits(name, second)).abs().max() > 1e-3
