"""Building blocks of the test processors (`Tiny.processor`): a tiny tokenizer, real image processors, chat templates.

The processor classes are those of transformers. Sizes fit the tiny configs; the templates have the structure of those
that the models of each family are published with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNKNOWN, NEWLINE_ID, FIRST_CHARACTER, FIRST_MERGE, VOCABULARY = 3, 4, 5, 116, 128
"""Ids 5 to 99 are the printable characters of ASCII in their order; special tokens have ids 0 to 2 and 100 to 115."""

MERGES = (
    ("\n", "\n"), ("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("o", "n"), ("r", "e"), (" ", "r"),
    (" ", "g"), (" ", "b"), (" ", "the"),
)  # fmt: skip
"""Merged pairs, ids 116 to 127. Some cross the boundary between a prompt and an answer, as in real vocabularies."""


def tiny_tokenizer(special: Mapping[int, str], named: Mapping[str, str], bos: bool = False) -> Any:
    """A fast tokenizer with a vocabulary of 128: characters and a few merges (byte pair encoding).

    Args:
        special: special tokens by id; 0 is the padding token, 2 the end token, and 1 the start token if `bos`.
        named: special tokens by the attribute under which the processor looks for them (`image_token` etc.).
        bos: there is a start token, and the tokenizer adds it to every text, as those of Llama and Gemma.
    """
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    words = {UNKNOWN: "<unk>", NEWLINE_ID: "\n"} | dict(special)
    words |= {FIRST_CHARACTER + i: chr(32 + i) for i in range(95)}
    words |= {FIRST_MERGE + i: "".join(pair) for i, pair in enumerate(MERGES)}
    vocabulary = {words.get(i, f"<unused{i}>"): i for i in range(VOCABULARY)}
    model = Tokenizer(models.BPE(vocabulary, list(MERGES), unk_token="<unk>"))
    model.decoder = decoders.Fuse()
    model.add_special_tokens(list(special.values()))
    if bos:
        model.post_processor = processors.TemplateProcessing(
            f"{special[1]} $A", f"{special[1]} $A $B", [(special[1], 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=special[0],
        bos_token=special[1] if bos else None,
        eos_token=special[2],
        unk_token="<unk>",
        extra_special_tokens=dict(named),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def image_processor(name: str, **sizes: Any) -> Any:
    """The image processor `name` of transformers: on torchvision if it is installed, on PIL otherwise."""
    import transformers
    from transformers.utils import is_torchvision_available

    return getattr(transformers, name if is_torchvision_available() else f"{name}Pil")(**sizes)


def square_size(side: int) -> dict[str, int]:
    """A size in pixels, as image processors read it."""
    return {"height": side, "width": side}


# ------------------------------------------------------------------------------------------------------ templates

CHATML = {0: "<|endoftext|>", 1: "<|im_start|>", 2: "<|im_end|>"}
"""The first special tokens of tokenizers for ChatML."""


def chatml(image: str, video: str = "", system: str = "") -> str:
    """A template in ChatML whose contents are strings or lists of parts.

    Args:
        image: text of an image part.
        video: text of a video part.
        system: system prompt of conversations that bring none; empty for no prompt.
    """
    default = ""
    if system:
        default = (
            "{%- if messages[0]['role'] != 'system' -%}"
            f"{{{{- '<|im_start|>system\\n{system}<|im_end|>\\n' -}}}}"
            "{%- endif -%}"
        )
    return (
        "{%- macro body(content) -%}"
        "{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{- '{image}' -}}}}"
        f"{{%- elif part['type'] == 'video' -%}}{{{{- '{video}' -}}}}"
        "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        f"{default}"
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' + body(message['content']) + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    )
