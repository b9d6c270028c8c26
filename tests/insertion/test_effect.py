"""What a plan makes of a batch is counted without the language model, and refused if it is nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support import TOKENS, batch, tiny_model

import tpcompress as tp
from tpcompress.insertion.attach import attach, detach, is_attached, mode
from tpcompress.insertion.effect import check_prunes, effect_of
from tpcompress.insertion.plan import PruningPlan, Stage

STAGES = [Stage("divprune", 0, keep_tokens=20), Stage("uniform", 3, keep_ratio=0.25)]


def test_words_of_an_effect() -> None:
    model = tiny_model()
    inputs = batch([(5, 2, 7), (3, 1, 8)])
    dense = effect_of(model, inputs)
    assert str(dense) == "2 rows, 3 images: vision tokens 64 per image, 64 to 128 per row; sequence 77 to 144"
    assert dense.plan is None
    assert dense.layer_lengths(6) == [[144] * 6, [77] * 6]
    check_prunes(dense)
    effect = effect_of(model, inputs, PruningPlan(STAGES))
    assert str(effect).splitlines()[1:] == [
        "stage 0 (divprune, layer 0): retains 20 of 64 per image; sequence 33 to 56",
        "stage 1 (uniform, layer 3): retains 16 of 64 per image; sequence 29 to 48",
    ]
    assert effect.layer_lengths(6) == [[56] * 3 + [48] * 3, [33] * 3 + [29] * 3]
    text = effect_of(model, batch([(5, 0, 7)]), PruningPlan(STAGES))
    assert (text.images, text.prunes, str(text)) == (
        (), False, "1 row, 0 images: vision tokens 0 per image, 0 per row; sequence 12"
    )  # fmt: skip
    assert text.layer_lengths(6) == [[12] * 6]
    check_prunes(text)


def test_a_plan_that_shortens_no_row_is_refused() -> None:
    """SmolVLM's `keep_tokens: 64` of 64 per tile; a row of small images is no reason."""
    model = tiny_model("smolvlm")
    rows = [batch([sample], family="smolvlm", config=model.config) for sample in ((5, 1, 7), (3, ["wide"], 8))]
    tile = PruningPlan([Stage("divprune", 0, keep_tokens=16)], scope="tile")
    message = (
        r"The plan prunes nothing: it retains all of the 16 vision tokens per tile in the first 2 rows \(budget: 16 "
        r"tokens\). Give a smaller budget, such as keep_tokens=4 or keep_ratio=0.25, or scope: image, which counts "
        r"over the 48 to 64 tokens of an image."
    )
    with pytest.raises(ValueError, match=message):
        check_prunes([effect_of(model, row, tile) for row in rows], "the first 2 rows")
    between = PruningPlan([Stage("divprune", 0, keep_tokens=48)])
    small, wide = (effect_of(model, row, between) for row in rows)
    assert (small.prunes, wide.prunes) == (False, True)
    check_prunes([small, wide])
    with pytest.raises(ValueError, match="48 vision tokens per image in these rows"):
        check_prunes(small)


def test_counts_that_no_image_exceeds_are_refused_where_all_have_one_size() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="all of the 64 vision tokens per image in every image of LlavaFor"):
        attach(model, "divprune", keep_tokens=TOKENS)
    assert not is_attached(model)
    for plan in ("divprune:1.0", "divprune:64@0,uniform:63@2"):
        detach(attach(model, plan))
    attach(model, PruningPlan([Stage("divprune", 0, keep_tokens=TOKENS)], scope="prompt"))


@pytest.fixture
def any_size(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.WARNING, "tpcompress")
    return tiny_model("qwen2_5_vl")


def test_the_first_call_that_prunes_nothing_warns(any_size: Any, caplog: pytest.LogCaptureFixture) -> None:
    inputs = batch([(5, 1, 7)], family="qwen2_5_vl", config=any_size.config)
    attach(any_size, "divprune", keep_tokens=999)
    with torch.no_grad():
        for _ in range(2):
            any_size(**inputs)
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert "retains all of the 64 vision tokens per image in the first call with images (budget: 999 tokens)" in said[0]


@pytest.mark.parametrize("how", ["prunes", "asked", "another budget", "off"])
def test_no_warning(any_size: Any, caplog: pytest.LogCaptureFixture, how: str) -> None:
    inputs = batch([(5, 1, 7)], family="qwen2_5_vl", config=any_size.config)
    attach(any_size, "divprune", **({"keep_ratio": 1.0} if how == "asked" else {"keep_tokens": 9}))
    if how == "another budget":
        with tp.budgets(any_size, keep_tokens=999), torch.no_grad():
            any_size(**inputs)
    with mode(any_size, "off" if how == "off" else "drop"), torch.no_grad():
        any_size(**inputs)
    assert caplog.records == []
