"""Save the base model in the layout of the hub: weights, tokenizer, processor, chat template."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

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
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?]"), behavior="isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """Build the processor; its image processor does not require torchvision."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def publish(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save everything that `from_pretrained` needs."""
    model = model.eval().to(torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False, max_new_tokens=8
    )
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
