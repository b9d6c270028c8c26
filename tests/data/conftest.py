import json
from functools import cache

import pytest
from PIL import Image
from skimage import data as photos
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

# That of llava-1.5: images first, answers without an end token.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ '<image>\n' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORD_TEMPLATE = (  # plain string contents, as text-only templates have them
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<q> ' + m['content'] + ' <a>' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s> ' }}{% endif %}{% endfor %}"
)
SENTENCE = "what is this ? a cat , dog woman in space suit coffee cup how many one two red yes no colour"
WORDS = SENTENCE.split()
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>", "<q>", "<a>"]
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CORPUS = [SENTENCE] * 4 + ["USER: what is this ? ASSISTANT: a cat . Äpfel, 苹果"] * 4


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=SPECIAL + byte_pieces, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


TOKENIZERS = {
    "byte": (byte_level, LLAVA_TEMPLATE),
    "piece": (sentencepiece_like, LLAVA_TEMPLATE),
    "chatml": (byte_level, CHATML_TEMPLATE),
    "word": (word_level, WORD_TEMPLATE),
}


def make_processor(kind: str, template: str | None = None) -> LlavaProcessor:
    """A processor whose images have 4 x 4 vision tokens."""
    build, own_template = TOKENIZERS[kind]
    core = build()
    if kind != "chatml":  # Llama's tokenizers put the beginning token in front by themselves
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = [token for token in SPECIAL if token not in NAMES.values()]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=special, **NAMES)
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template or own_template,
    )  # fmt: skip


@pytest.fixture(scope="session")
def processor_of():
    return cache(make_processor)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(getattr(photos, name)()).resize((96, 64)).save(folder / f"{name}.jpg")
    Image.fromarray(photos.camera()).resize((64, 64)).save(folder / "camera.png")
    return folder


@pytest.fixture
def llava_json(photo_folder, tmp_path):
    def write(records: list[dict], name: str = "chat.json"):
        path = tmp_path / name
        lines = "\n".join(json.dumps(record) for record in records)
        path.write_text(lines if name.endswith("jsonl") else json.dumps(records, indent=1))
        return path

    return write


@pytest.fixture(scope="session")
def record():
    """Records in LLaVA's format."""

    def make(image="astronaut.jpg", row_id=0, turns=("<image>\nwhat is this ?", "a woman")) -> dict:
        conversation = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        return {"id": row_id, "conversations": conversation} | ({} if image is None else {"image": image})

    return make
