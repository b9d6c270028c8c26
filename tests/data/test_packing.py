"""Rows that share sequences equal rows apart: logits, loss and pruning; what would not is refused."""

import pytest
import torch
from chat_rows import ONE, TURNS, TWO, WORDS, processor_of
from support import MAIN_FAMILIES, family_folder
from transformers import AutoConfig, AutoModelForImageTextToText

import tpcompress as tp
from tpcompress.data import BadRow, ChatCollator
from tpcompress.data.packing import why_config_not_packed, why_not_packed
from tpcompress.families import list_families

ROWS = [ONE, WORDS, TURNS, TWO]
REFUSED = {
    "aya_vision", "cohere2_vision", "ernie4_5_vl_moe", "gemma3", "gemma4", "gemma4_unified", "glm4v", "got_ocr2",
    "lfm2_vl", "paddleocr_vl", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl",
}  # fmt: skip
PACKED = [
    pytest.param(name, marks=() if name in MAIN_FAMILIES else pytest.mark.slow)
    for name in list_families()
    if name not in REFUSED
]


def reason(name: str) -> str | None:
    encoder = ChatCollator(processor_of(name)).encoder
    return why_not_packed(encoder) or why_config_not_packed(AutoConfig.from_pretrained(family_folder(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", list_families())
def test_families_that_cannot_be_packed(name):
    assert (reason(name) is not None) == (name in REFUSED - {"got_ocr2"})


@pytest.mark.parametrize("plan", [None, "divprune"])
@pytest.mark.parametrize("name", PACKED)
def test_rows_in_one_sequence_equal_rows_apart(name, plan):
    collator = ChatCollator(processor_of(name))
    lengths = [len(collator.encode(one)[0].input_ids) for one in ROWS]
    filling = ChatCollator(processor_of(name), max_length=max(max(lengths), sum(lengths[:3])), pack_sequences=True)
    apart, together = collator(ROWS), filling(ROWS)
    first, second = apart.pop("meta"), together.pop("meta")
    assert len(together["input_ids"]) == 2 < len(apart["input_ids"])
    assert second.families == [["chat"] * 3, ["chat"]]
    assert second.num_answers == first.num_answers
    assert set(second.ids).isdisjoint(first.ids[:3])
    model = AutoModelForImageTextToText.from_pretrained(family_folder(name)).eval()
    if plan:
        tp.attach(model, plan, keep_tokens=3)
    with torch.no_grad():
        single, filled = model(**apart), model(**together)
    torch.testing.assert_close(filled.loss, single.loss, atol=1e-5, rtol=1e-5)
    if plan:
        return
    for number, at in enumerate([(0, 1), (0, 2), (0, 3), (1, 1)]):
        own = second.segments[at[0]] == at[1]
        torch.testing.assert_close(
            filled.logits[at[0], own], single.logits[number, : lengths[number]], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", [n for n in MAIN_FAMILIES if n in REFUSED])
@pytest.mark.parametrize("how", ["pack", "pack_sequences"])
def test_what_packing_would_lose_is_refused(name, how):
    with pytest.raises(ValueError, match=rf"^{how} is not exact here: \w+ returns (mm_)?token_type_ids, [^\n]*$"):
        ChatCollator(processor_of(name), max_length=999, **{how: True})


def test_packing_is_checked():
    processor = processor_of("llava")
    with pytest.raises(ValueError, match="exclude each other"):
        ChatCollator(processor, 99, pack=True, pack_sequences=True)
    with pytest.raises(ValueError, match="set max_length"):
        ChatCollator(processor, pack_sequences=True)


def test_the_positions_of_the_model_are_a_limit():
    long = ONE | {"conversations": [[ONE["conversations"][0][0], {"role": "assistant", "content": "red " * 40}]]}
    needed = len(ChatCollator(processor_of("llava")).encode(long)[0].input_ids)
    assert ChatCollator(processor_of("llava"), max_positions=needed).encode(long)
    with pytest.raises(BadRow, match=f"^too long: {needed} tokens for the {needed - 1} positions of the model"):
        ChatCollator(processor_of("llava"), max_positions=needed - 1).encode(long)
    assert ChatCollator(processor_of("llava"), needed - 1, max_positions=needed - 1).encode(long)[0].dropped == 1
