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

BYTES = str.maketrans({"\n": "\u010a", " ": "\u0120"})
"""How byte-level vocabularies spell line break and blank; other printable characters stand for themselves."""


def tiny_tokenizer(special: Mapping[int, str], named: Mapping[str, str], bos: bool = False) -> Any:
    """A fast tokenizer with a vocabulary of 128: characters and a few merges (byte-level byte pair encoding).

    Args:
        special: special tokens by id; 0 is the padding token, 2 the end token, and 1 the start token if `bos`.
        named: special tokens by the attribute under which the processor looks for them (`image_token` etc.).
        bos: there is a start token, and the tokenizer adds it to every text, as those of Llama and Gemma.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [(a.translate(BYTES), b.translate(BYTES)) for a, b in MERGES]
    words = {UNKNOWN: "<unk>", NEWLINE_ID: "\n".translate(BYTES)} | dict(special)
    words |= {FIRST_CHARACTER + i: chr(32 + i).translate(BYTES) for i in range(95)}
    words |= {FIRST_MERGE + i: "".join(pair) for i, pair in enumerate(merges)}
    vocabulary = {words.get(i, f"<unused{i}>"): i for i in range(VOCABULARY)}
    model = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(list(special.values()))
    if bos:
        single, pair = f"{special[1]} $A", f"{special[1]} $A $B:1"
        model.post_processor = processors.TemplateProcessing(single, pair, [(special[1], 1)])
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


def turns(roles: Mapping[str, tuple[str, str]], generation: str, image: str, video: str = "", start: str = "") -> str:
    """A template that writes one turn after the other; contents are strings or lists of parts.

    Args:
        roles: what stands before and after the turns of each role; turns of other roles are left out.
        generation: the generation prompt.
        image: text of an image part.
        video: text of a video part.
        start: what every conversation starts with.
    """
    branches = "".join(
        f"{{%- {'if' if number == 0 else 'elif'} message['role'] == '{role}' -%}}"
        f"{{{{- {before!r} + body(message['content']) + {after!r} -}}}}"
        for number, (role, (before, after)) in enumerate(roles.items())
    )
    return (
        "{%- macro body(content) -%}"
        "{%- if content is string -%}{{- content -}}{%- else -%}{%- for part in content -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{- {image!r} -}}}}"
        f"{{%- elif part['type'] == 'video' -%}}{{{{- {video!r} -}}}}"
        "{%- elif 'text' in part -%}{{- part['text'] -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        f"{{{{- {start!r} -}}}}"
        f"{{%- for message in messages -%}}{branches}{{%- endif -%}}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{{{{- {generation!r} -}}}}{{%- endif -%}}"
    )


def chatml(image: str, video: str = "", system: str = "", start: str = "") -> str:
    """A template in ChatML.

    Args:
        image: text of an image part.
        video: text of a video part.
        system: system prompt of conversations that bring none; empty for no prompt.
        start: what every conversation starts with.
    """
    roles = {role: (f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant", "tool")}
    default = ""
    if system:
        text = f"<|im_start|>system\n{system}<|im_end|>\n"
        default = f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {text!r} -}}}}{{%- endif -%}}"
    return default + turns(roles, "<|im_start|>assistant\n", image, video, start)
