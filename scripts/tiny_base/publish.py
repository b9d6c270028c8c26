"""Save the base model in the layout of the hub: weights, tokenizer, processor, chat template."""

from pathlib import Path

import torch
from tokenizers import Regex, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from word_processor import llava_processor, word_tokenizer

from tiny_base.batches import IMAGE_MEAN, IMAGE_STD
from tiny_base.model import BOS_ID, EOS_ID, PAD_ID
from tpcompress.data.benchmark.vocabulary import BOS, EOS, IMAGE, IMAGE_SIZE, PAD, PATCH, UNKNOWN, WORDS

# "<image><bos> question ? answer <eos>" per turn; images come before the turn's <bos>, regardless of their position.
CHAT_TEMPLATE = """
{%- for message in messages -%}
    {%- set turn = namespace(images='', text='') -%}
    {%- if message['content'] is string -%}
        {%- set turn.text = message['content'] -%}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {%- set turn.images = turn.images + '<image>' -%}
            {%- elif part['type'] == 'text' -%}
                {%- set turn.text = turn.text + ' ' + part['text'] -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- for _ in range(turn.text.count('<image>')) -%}
        {%- set turn.images = turn.images + '<image>' -%}
    {%- endfor -%}
    {%- set turn.text = turn.text.replace('<image>', ' ') | trim -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' ' -}}{%- generation -%}{{- turn.text + ' <eos>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- turn.images + '<bos> ' + turn.text -}}
    {%- endif -%}
{%- endfor -%}
""".strip()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer that splits off question marks."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?]"), behavior="isolated")]
    )
    return word_tokenizer(WORDS, split, PAD, BOS, EOS, UNKNOWN, IMAGE)


def build_processor() -> LlavaProcessor:
    """Build the processor."""
    return llava_processor(build_tokenizer(), IMAGE_SIZE, PATCH, IMAGE_MEAN, IMAGE_STD, CHAT_TEMPLATE)


def publish(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save everything that `from_pretrained` needs."""
    model = model.eval().to(torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False, max_new_tokens=8
    )
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
