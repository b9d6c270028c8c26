"""A tiny model that has learnt a part of the benchmark's answers, so that right and wrong ones both occur."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tpcompress.data import ChatCollator
from tpcompress.data.benchmark import load_benchmark
from tpcompress.data.benchmark.vocabulary import BOS, EOS, IMAGE, PAD, UNKNOWN, WORDS
from tpcompress.families.llava import tiny_config

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ m['content'].replace('\n', ' ').replace('<image>', '<image><bos>') }}{% else %}"
    "{{ ' ' + m['content'] + ' <eos>' }}{% endif %}{% endfor %}"
)


def make_processor() -> LlavaProcessor:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        images, fast, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def train(model, processor, rows, steps: int = 60) -> None:
    batch = ChatCollator(processor, pack=True)(list(rows))
    batch.pop("meta")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def rows():
    return load_benchmark("test", 12)


@pytest.fixture(scope="session")
def _learned(processor, rows):
    torch.manual_seed(0)
    config = tiny_config(layers=3)
    config.text_config.vocab_size = len(WORDS)
    config.image_token_id = config.image_token_index = WORDS.index(IMAGE)
    for name, word in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
        setattr(config.text_config, name, WORDS.index(word))
    model = LlavaForConditionalGeneration(config)
    train(model, processor, rows.select(range(8)))
    return model.eval()


@pytest.fixture
def vqa(_learned):
    """The model, to attach to as one likes."""
    return copy.deepcopy(_learned)
