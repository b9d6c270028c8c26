import hashlib
from collections import Counter
from random import Random

import numpy as np
import pytest

from tpcompress.data.benchmark import FAMILIES, TinyVQA, draw_benchmark, load_benchmark, make_row, stream_benchmark
from tpcompress.data.benchmark.digits import SPLITS, digit_samples
from tpcompress.data.benchmark.render import render
from tpcompress.data.benchmark.symbolic import Bar, Card, Field, ImageSpec, Shape, Tag, draw_image_spec, patch_labels
from tpcompress.data.benchmark.vocabulary import DIGITS, LABELS, WORDS


@pytest.fixture(scope="module")
def pictures() -> list[ImageSpec]:
    return [draw_image_spec(Random(f"test of answers/{i}"), limit=3) for i in range(600)]


def fingerprint(row: dict) -> str:
    return hashlib.sha256(np.asarray(row["images"][0]).tobytes()).hexdigest()


def answer_from_items(picture: ImageSpec, family: str, text: str) -> str:
    """Read the answer off the items again, by other means than the generator's."""
    words = text.split()
    of = {kind: [item for item in picture.items if isinstance(item, kind)] for kind in (Shape, Tag, Field, Bar, Card)}
    match family:
        case "scene":
            return picture.texture
        case "attr":
            (shape,) = (shape for shape in of[Shape] if shape.name == words[4])
            return shape.colour
        case "ground":
            (shape,) = (shape for shape in of[Shape] if [shape.colour, shape.name] == words[3:5])
            return f"<x{shape.column}> <y{shape.row}>"
        case "exist":
            return "yes" if any([shape.colour, shape.name] == words[3:5] for shape in of[Shape]) else "no"
        case "count":
            plural = words[2]
            return str(sum(plural in (shape.name + "s", shape.name + "es") for shape in of[Shape]))
        case "needle":
            (tag,) = (tag for tag in of[Tag] if tag.colour == words[5])
            return tag.letter
        case "ocr":
            (field,) = (field for field in of[Field] if field.colour == words[2])
            return " ".join(field.characters)
        case "digits":
            (card,) = (card for card in of[Card] if card.colour == words[5])
            return card.digit
        case "chart" if "tallest" in words:
            return sorted(of[Bar], key=lambda bar: -bar.value)[0].colour
        case "chart":
            (bar,) = (bar for bar in of[Bar] if bar.colour == words[6])
            return str(bar.value)
    raise AssertionError(family)


def test_every_answer_is_right(pictures):
    for picture in pictures:
        for question in picture.questions:
            assert question.answer == answer_from_items(picture, question.family, question.text)


def test_all_families_occur_and_use_known_words(pictures):
    questions = [question for picture in pictures for question in picture.questions]
    assert {question.family for question in questions} == set(FAMILIES)
    used = {word for question in questions for word in f"{question.text} {question.answer}".split()}
    assert used <= set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


def test_no_family_can_be_guessed(pictures):
    answers = {family: Counter() for family in FAMILIES}
    for picture in pictures:
        for question in picture.questions:
            answers[question.family][question.answer] += 1
    share = {family: max(count.values()) / count.total() for family, count in answers.items()}
    assert share["exist"] < 0.55
    assert share["count"] < 0.45
    assert all(share[family] < 0.4 for family in set(FAMILIES) - {"exist", "count"})


def test_absent_things_are_hard_negatives(pictures):
    shares = []
    for picture in pictures:
        shapes = [item for item in picture.items if isinstance(item, Shape)]
        for question in picture.questions:
            if question.family == "exist" and question.answer == "no":
                colour, name = question.text.split()[3:5]
                shares.append(colour in {s.colour for s in shapes} and name in {s.name for s in shapes})
    assert np.mean(shares) > 0.5


def test_items_never_overlap_and_labels_are_known(pictures):
    for picture in pictures:
        labels, rest = patch_labels(picture)
        sizes = {Shape: 4, Card: 4, Tag: 1, Field: 4}
        patches = sum(item.value if isinstance(item, Bar) else sizes[type(item)] for item in picture.items)
        assert len(labels) == patches
        assert all(0 <= column < 12 and 0 <= row < 12 for column, row in labels)
        assert set(rest).union(*labels.values()) <= set(LABELS)
        assert len(rest) == 1
        assert all(len(own) >= 2 for own in labels.values())


def test_rows_are_deterministic_and_follow_the_contract():
    first, again = make_row("train", 3, 5), make_row("train", 3, 5)
    assert fingerprint(first) == fingerprint(again)
    assert first["conversations"] == again["conversations"]
    assert first["images"][0].size == (96, 96)
    assert len(first["conversations"]) == len(first["families"])
    for conversation in first["conversations"]:
        assert [turn["role"] for turn in conversation] == ["user", "assistant"]
        assert "<image>" not in conversation[0]["content"]


def test_splits_and_seeds_are_disjoint():
    streams = [(split, seed) for split in SPLITS for seed in (0, 1)]
    seen = [fingerprint(make_row(split, seed, index)) for split, seed in streams for index in range(40)]
    assert len(set(seen)) == len(seen)


def test_held_out_digits_never_occur_in_training():
    drawn = {split: {sample.tobytes() for d in DIGITS for sample in digit_samples(split, d)} for split in SPLITS}
    assert all(drawn.values())
    assert drawn["train"].isdisjoint(drawn["validation"] | drawn["test"])
    assert drawn["validation"].isdisjoint(drawn["test"])


def test_digits_are_drawn_from_the_split_asked_for():
    picture = draw_image_spec(Random(1), "digits")
    train, test = (render(picture, Random(0), split) for split in ("train", "test"))
    assert (train != test).any()


def test_the_three_ways_to_load_agree():
    stored = load_benchmark("validation", 4, seed=2)
    streamed = list(stream_benchmark("validation", 4, seed=2))
    for index in range(4):
        row = make_row("validation", 2, index)
        for loaded in (stored[index], streamed[index]):
            assert fingerprint(loaded) == fingerprint(row)
            assert loaded["conversations"] == row["conversations"]
            assert loaded["families"] == row["families"]


def test_builder_caches_by_configuration(tmp_path):
    sizes = {}
    for validation in (2, 3):
        builder = TinyVQA(cache_dir=str(tmp_path), train=1, validation=validation, test=1)
        builder.download_and_prepare()
        sizes[validation] = len(builder.as_dataset("validation"))
    assert sizes == {2: 2, 3: 3}
    assert fingerprint(builder.as_dataset("test")[0]) == fingerprint(make_row("test", 0, 0))


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="No split 'dev'.*train, validation, test"):
        load_benchmark("dev", 1)


def test_drawn_rows_are_the_loaded_rows():
    loaded, drawn = load_benchmark("validation", 6, seed=2), draw_benchmark("validation", 6, seed=2)
    assert len(drawn) == 6
    for index in (5, 0, 3):
        assert drawn[index]["conversations"] == loaded[index]["conversations"]
        assert drawn[index]["families"] == loaded[index]["families"]
        assert drawn[index]["images"][0].tobytes() == loaded[index]["images"][0].tobytes()
