import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tpcompress.data import BadRow, ChatCollator, PromptCollator, load_chat, packed_mask

KINDS = ["byte", "piece", "chatml", "word"]
END = {"byte": "</s>", "piece": "</s>", "chatml": "<|im_end|>", "word": "</s>"}


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def row(images: list, *conversations: list[dict]) -> dict:
    return {
        "images": images,
        "conversations": list(conversations),
        "families": [f"f{i}" for i in range(len(conversations))],
    }


@pytest.fixture
def photos(photo_folder):
    return [str(photo_folder / name) for name in ("astronaut.jpg", "chelsea.jpg", "camera.png")]


@pytest.fixture
def collator_of(processor_of):
    return lambda kind, **options: ChatCollator(processor_of(kind), **options)


def learnt(batch: dict, index: int, tokenizer) -> list[str]:
    """Decoded runs of labels of one sequence."""
    runs: list[list[int]] = [[]]
    for label in batch["labels"][index].tolist():
        runs = [*runs[:-1], [*runs[-1], label]] if label != -100 else [*runs, []] if runs[-1] else runs
    return [tokenizer.decode(run).strip() for run in runs if run]


def tiny_model(processor) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=8),
        text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(processor.tokenizer)),
        image_token_id=processor.image_token_id, vision_feature_layer=-1, image_seq_length=16,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_answers_and_their_end(kind, collator_of, photos):
    collator = collator_of(kind)
    rows = [
        row(photos[:1], talk("<image>\nwhat is this ?", "a woman in space suit", "colour ?", "red")),
        row([], talk("how many ?", "one two")),
        row(photos[1:], talk("<image> <image>\nhow many ?", "two", "what ?", "a cat")),
    ]
    batch = collator(rows)
    tokenizer, end = collator.encoder.tokenizer, END[kind]
    space = " " if kind == "word" else ""
    expected = [["a woman in space suit", "red"], ["one two"], ["two", "a cat"]]
    for index, answers in enumerate(expected):
        assert learnt(batch, index, tokenizer) == [f"{answer}{space}{end}" for answer in answers]
    learnable = batch["labels"] != -100
    assert torch.equal(batch["labels"][learnable], batch["input_ids"][learnable])
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert (batch["input_ids"] == collator.encoder.processor.image_token_id).sum(1).tolist() == [16, 0, 32]
    assert batch["attention_mask"].sum(1).tolist() == (batch["meta"].segments == 1).sum(1).tolist()
    assert batch["attention_mask"][1, -1] == 0
    assert batch["meta"].answers == [["red"], ["one two"], ["a cat"]]
    assert batch["meta"].rows == [0, 1, 2]


@pytest.mark.parametrize("text", ["苹果 Äpfel 🙂", "a  b\n\nc", "a </s> b", " leading", "trailing  "])
@pytest.mark.parametrize("kind", ["byte", "piece", "chatml"])
def test_odd_answers_keep_their_text(kind, text, collator_of):
    collator = collator_of(kind)
    if kind == "piece":  # its tiny vocabulary has no line break but as a byte
        text = text.replace("\n", " ")
    batch = collator([row([], talk("what ?", text))])
    decoded = collator.encoder.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    # ChatML ends a turn right behind the content; the other templates write a space that is left out.
    assert decoded.strip() == (text.lstrip() if kind == "chatml" else text.strip()) + END[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_processor(kind, collator_of, photos):
    collator = collator_of(kind)
    processor, messages = collator.encoder.processor, talk("<image>\nwhat is this ?", "a cat")
    prompt = PromptCollator(processor)([row(photos[:1], messages)])
    parts = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
    content = "<image>\nwhat is this ?" if kind == "word" else parts
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    direct = processor(text=text, images=Image.open(photos[0]), return_tensors="pt")
    assert torch.equal(prompt["input_ids"], direct["input_ids"])
    assert torch.equal(prompt["pixel_values"], direct["pixel_values"])
    batch = collator([row(photos[:1], messages)])
    assert torch.equal(batch["input_ids"][:, : direct["input_ids"].shape[1]], direct["input_ids"])
    first = (batch["labels"][0] != -100).nonzero()[0].item()
    assert first == direct["input_ids"].shape[1], "the first learnt token is the first to be generated"


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_stop_where_the_last_answer_starts(kind, processor_of, photos):
    processor = processor_of(kind)
    long = row(photos[:1], talk("<image> what is this ?", "a cat", "colour ?", "red"))
    prompts = PromptCollator(processor)([row([], talk("how many ?", "one")), long])
    whole = ChatCollator(processor)([long])
    ids = prompts["input_ids"][1][prompts["attention_mask"][1] == 1]
    last = (whole["labels"][0] != -100).nonzero()[-1].item()
    answer = (whole["labels"][0, len(ids) : last + 1] != -100).all()
    assert torch.equal(ids, whole["input_ids"][0, : len(ids)])
    assert answer
    assert whole["labels"][0, len(ids) - 1] == -100
    assert prompts["attention_mask"][0, 0] == 0, "padded on the left"
    assert prompts["attention_mask"][:, -1].tolist() == [1, 1]
    assert prompts["meta"].answers == [["one"], ["red"]]
    assert "labels" not in prompts


def test_images_without_a_marker_come_first(collator_of, photos):
    collator = collator_of("byte")
    bare, marked = talk("what ?", "a cat", "and ?", "no"), talk("<image>\n<image>\nwhat ?", "a cat", "and ?", "no")
    batches = [collator([row(photos[:2], messages)]) for messages in (bare, marked)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_images_are_processed_once_per_row(collator_of, photos, monkeypatch):
    collator = collator_of("word")
    calls, own = [], collator.encoder.processor.image_processor.preprocess
    processor_class = type(collator.encoder.processor.image_processor)
    monkeypatch.setattr(processor_class, "preprocess", lambda self, *a, **k: calls.append(1) or own(*a, **k))
    questions = [talk(f"<image> how many {word} ?", "two", "colour ?", "red") for word in ("cat", "dog", "cup")]
    batch = collator([row(photos[:1], *questions)])
    assert len(calls) == 1
    assert batch["pixel_values"].shape[0] == batch["input_ids"].shape[0] == 3
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][2])
    assert batch["meta"].rows == [0, 0, 0]
    assert batch["meta"].families == [["f0"], ["f1"], ["f2"]]


def test_a_batch_of_text_has_no_pixels_and_trains(collator_of):
    collator = collator_of("byte")
    batch = collator([row([], talk("how many ?", "one")), row([], talk("colour ?", "red"))])
    meta = batch.pop("meta")
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert meta.num_conversations == 2
    assert tiny_model(collator.encoder.processor)(**batch).loss.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_equals_its_conversations_apart(kind, collator_of, photos):
    plain, packed = collator_of(kind), collator_of(kind, pack=True)
    rows = [
        row(photos[:1], *[talk(f"<image> how many {word} ?", "two red") for word in ("cat", "dog", "cup cup cup")]),
        row(photos[1:2], talk("<image> what is this ?", "a cat", "and ?", "no"), talk("<image> colour ?", "red")),
        row([], talk("how many ?", "one")),
    ]
    apart, together = plain(rows), packed(rows)
    meta, apart_meta = together.pop("meta"), apart.pop("meta")
    assert together["input_ids"].shape[0] == 3
    assert together["attention_mask"].shape == (3, 1, *2 * together["input_ids"].shape[1:])
    assert together["attention_mask"].any(-1).all(), "no row without a key"
    model = tiny_model(packed.encoder.processor)
    with torch.no_grad():
        logits, apart_logits = model(**together).logits, model(**apart).logits
    assert logits.isfinite().all()
    number = 0
    for index, families in enumerate(meta.families):
        assert families == [family[0] for family in apart_meta.families[number : number + len(families)]]
        for k in range(1, len(families) + 1):
            own = (meta.segments[index] == 0) | (meta.segments[index] == k)
            length = int(apart["attention_mask"][number].sum())
            assert torch.equal(together["input_ids"][index, own], apart["input_ids"][number, :length])
            assert torch.equal(together["labels"][index, own], apart["labels"][number, :length])
            torch.testing.assert_close(logits[index, own], apart_logits[number, :length], atol=1e-5, rtol=1e-5)
            number += 1
    assert number == apart["input_ids"].shape[0]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), together["labels"][:, 1:].flatten())
    own = torch.nn.functional.cross_entropy(apart_logits[:, :-1].flatten(0, 1), apart["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, own, atol=1e-5, rtol=1e-5)


def test_conversations_that_differ_in_one_answer_token_still_start_apart(collator_of, photos):
    packed = collator_of("word", pack=True)
    batch = packed([row(photos[:1], talk("<image> cat ?", "yes"), talk("<image> cat ?", "no"))])
    segments, labels = batch["meta"].segments[0], batch["labels"][0]
    for k in (1, 2):
        assert labels[segments == k][0] == -100, "its predecessor in the sequence belongs to another conversation"
        assert (labels[segments == k] != -100).sum() == 2


def test_packed_mask_by_hand():
    mask = packed_mask(torch.tensor([[0, 0, 1, 2, 2, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_max_length_cuts_text_but_never_images(collator_of, photos):
    long = row(photos[:1], talk("<image> what is this ?", "a cat " * 30))
    whole = collator_of("word")([long])
    first = (whole["labels"][0] != -100).nonzero()[0].item()
    cut = collator_of("word", max_length=first + 3)([long])
    assert cut["input_ids"].shape == (1, first + 3)
    assert (cut["labels"] != -100).sum() == 3
    assert cut["meta"].dropped == 1
    assert collator_of("word", max_length=500)([long])["meta"].dropped == 0
    with pytest.raises(BadRow, match=rf"^too long: [^\n]*need {first + 1} tokens"):
        collator_of("word", max_length=first)([long])
    late = row(photos[:1], talk("how many ?", "one", "<image> what ?", "a cat"))
    with pytest.raises(BadRow, match="^too long"):
        collator_of("word", max_length=15)([late])


def test_max_length_drops_packed_conversations(collator_of, photos):
    many = row(photos[:1], *[talk(f"<image> how many {word} ?", "two") for word in ("cat", "dog", "cup")])
    length = collator_of("word", pack=True)([many])["input_ids"].shape[1]
    batch = collator_of("word", pack=True, max_length=length - 1)([many])
    assert batch["meta"].families == [["f0", "f1"]]
    assert batch["meta"].dropped == 1
    with pytest.raises(BadRow, match="^too long: one conversation needs"):
        collator_of("word", pack=True, max_length=18)([many])


def test_what_cannot_be_encoded_is_a_bad_row(processor_of, photos, collator_of):
    with pytest.raises(BadRow, match="^image markers: 2 for 1 images$"):
        collator_of("byte")([row(photos[:1], talk("<image> <image> what ?", "a cat"))])
    with pytest.raises(BadRow, match="^missing image"):
        collator_of("byte")([row(["gone.jpg"], talk("<image> what ?", "a cat"))])
    late = [talk("how many ?", "one", "<image> what ?", "a cat"), talk("colour ?", "one", "<image> what ?", "no")]
    with pytest.raises(BadRow, match="^conversations differ before their images end"):
        collator_of("byte", pack=True)([row(photos[:1], *late)])


@pytest.fixture
def spoiled(processor_of):
    """A processor whose attributes a test may change."""
    processor = processor_of("byte")
    template, tokenizer = processor.chat_template, processor.tokenizer
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    yield processor
    processor.chat_template, processor.tokenizer = template, tokenizer
    tokenizer.eos_token, tokenizer.pad_token = eos, pad


def test_templates_that_drop_answers_teach_the_last_one(spoiled):
    spoiled.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'user' or loop.last %}"
        "{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else '<image>' }}{% endfor %}"
        "{% else %}{{ '...' }}{% endif %}{{ '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    several = row([], talk("what ?", "a cat", "and ?", "no"))
    collator = ChatCollator(spoiled)
    assert learnt(collator([row([], talk("what ?", "a cat"))]), 0, spoiled.tokenizer) == ["a cat</s>"]
    with pytest.raises(BadRow, match=r"^the chat template does not render the answer of turn 1; set learn_from[^\n]*$"):
        collator([several])
    assert learnt(ChatCollator(spoiled, learn_from="last")([several]), 0, spoiled.tokenizer) == ["no</s>"]


def test_processors_that_cannot_serve_are_refused(spoiled):
    template = spoiled.chat_template
    spoiled.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="ends no answer and the tokenizer has no eos_token"):
        ChatCollator(spoiled)
    spoiled.chat_template = template.replace("messages", "messages[:1]")
    with pytest.raises(ValueError, match="does not render answers, so nothing can be learned"):
        ChatCollator(spoiled)
    spoiled.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template"):
        ChatCollator(spoiled)
    spoiled.tokenizer = None
    with pytest.raises(ValueError, match="LlavaProcessor has no fast tokenizer"):
        ChatCollator(spoiled)


def test_the_rows_of_load_chat_collate(llava_json, record, photo_folder, tmp_path, collator_of):

    records = [
        record(),
        record(None, 1, ("how many ?", "one")),
        record(["chelsea.jpg", "camera.png"], 2, ("what ?", "a cat")),
    ]
    rows, _ = load_chat(llava_json(records), photo_folder, cache_dir=tmp_path)
    batch = collator_of("byte")([rows[i] for i in range(3)])
    assert batch["pixel_values"].shape[0] == 3
    assert learnt(batch, 0, collator_of("byte").encoder.tokenizer) == ["a woman</s>"]


@pytest.mark.parametrize("pack", [False, True])
def test_a_batch_counts_its_answers_and_names_its_sequences(pack, collator_of, photos):
    collator = collator_of("chatml", pack=pack)
    first = row(photos[:1], talk("how many ?", "one"), talk("colour ?", "red"))
    second = row(photos[1:2], talk("what is this ?", "a cat"))
    batch = collator([first, second])
    meta = batch["meta"]
    assert meta.num_answers == int((batch["labels"][:, 1:] != -100).sum()) > 0
    assert len(meta.ids) == len(set(meta.ids)) == len(batch["input_ids"])
    turned = collator([second, first])["meta"].ids
    assert turned == meta.ids[-1:] + meta.ids[:-1]  # whatever the batch, the order and the padding
    others = [
        row(photos[1:2], *first["conversations"]),  # another image
        row(photos[:1], talk("how many ?", "two"), talk("colour ?", "yes")),  # other answers
        row([], talk("how many ?", "one"), talk("colour ?", "red")),
    ]
    for other in others:
        assert not set(collator([other])["meta"].ids) & set(meta.ids)
    if not pack:
        shorter = collator_of("chatml", max_length=len(collator.encode(second)[0].input_ids) - 2)
        assert shorter([second])["meta"].ids != meta.ids[-1:]
