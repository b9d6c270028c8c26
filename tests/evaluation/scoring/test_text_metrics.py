"""Metrics of generated text against values computed by hand, independent loops, and libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.text import BLEUScore
from torchvision.ops import box_iou

from tpcompress.evaluation.scoring.metrics import Metric, Reply, find_metric
from tpcompress.evaluation.scoring.metrics.iou import overlap
from tpcompress.evaluation.scoring.scores import Scores
from tpcompress.evaluation.scoring.text import as_number, vqa_normalized, yes_or_no

PROMPT = "Which one?\nA. a red car\nB. the blue car\nC. none\nAnswer with the letter."


class Longest(Metric):
    """A metric outside the folder: characters of the answer over those of the reference."""

    name = "longest"

    def of_reply(self, reply: Reply) -> tuple[float, ...]:
        return len(reply.text), len(reply.references[0])


@pytest.mark.parametrize(
    ("name", "text", "references", "value"),
    [
        ("exact_match", " a  red car", ["a red car"], 1),
        ("exact_match", "A red car", ["a red car"], 0),
        ("contains", "It is a RED\ncar, I think", ["blue", "red car"], 1),
        ("contains", "a car", ["red car"], 0),
        ("choice_letter", "B", ["B"], 1),
        ("choice_letter", "(b) the blue car", ["B"], 1),
        ("choice_letter", "The answer is B, a car.", ["B"], 1),
        ("choice_letter", "the blue car.", ["B"], 1),
        ("choice_letter", "A blue car is option B", ["B"], 1),
        ("choice_letter", "I see a car", ["A"], 0),
        ("choice_letter", "C.", ["none"], 1),
        ("anls", "Hello World", ["hello  world"], 1),
        ("anls", "hallo world", ["hello world"], 1 - 1 / 11),
        ("anls", "ab", ["cd"], 0),
        ("anls", "abxx", ["abcd"], 0),  # a distance of exactly one half is not below it
        ("anls", "abcx", ["zzzz", "abcd"], 0.75),
        ("relaxed_accuracy", "105", ["100"], 1),
        ("relaxed_accuracy", "105.1", ["100"], 0),
        ("relaxed_accuracy", "1,950", ["2000"], 1),
        ("relaxed_accuracy", "12%", ["0.12"], 1),
        ("relaxed_accuracy", "-95", ["-100"], 1),
        ("relaxed_accuracy", "0.01", ["0"], 0),
        ("relaxed_accuracy", "0", ["0"], 1),
        ("relaxed_accuracy", "Blue.", ["blue"], 1),
        ("f1", "a red car", ["the red truck"], 0.5),  # one word of two on both sides
        ("f1", "blue", ["red", "the Blue!"], 1),
        ("iou", "<box>(10, 10), (30, 30)</box>", ["[10, 10, 30, 30]"], 1),
        ("iou", "[10, 10, 30, 20]", ["[10, 10, 30, 30]"], 1),  # exactly one half
        ("iou", "[10, 10, 30, 19]", ["[10, 10, 30, 30]"], 0),
        ("iou", "there is none", ["[10, 10, 30, 30]"], 0),
        ("number", "There are 1,200 of them.", ["1200"], 1),
        ("number", "three", ["3"], 1),
        ("number", "2 or 3", ["3"], 0),
        ("number_error", "7", ["4", "5"], -2),
        ("number_error", "none of it is known", ["4"], -4),
        ("rouge_l", "the cat", ["the cat sat"], 0.8),  # precision 1, recall 2/3
    ],
)
def test_values_by_hand(name: str, text: str, references: list[str], value: float) -> None:
    counted = find_metric(name).of_reply(Reply(text, tuple(references), PROMPT))
    assert counted == pytest.approx((value, 1))


@pytest.mark.parametrize(("matches", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_every_annotator_out_once(matches: int, value: float) -> None:
    references = ["the Dog."] * matches + [f"cat {i}" for i in range(10 - matches)]
    found, weight = find_metric("vqa_accuracy").of_reply(Reply("A dog", tuple(references)))
    assert (found, weight) == (pytest.approx(value), 1)
    loop = [min(1, sum("Dog" in r for j, r in enumerate(references) if j != i) / 3) for i in range(10)]
    assert found == pytest.approx(sum(loop) / 10)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dogs!", "dogs"), ("1,000 people", "1000 people"), ("blue/green", "blue green"),
        ("dont know", "don't know"),
        ("three", "3"), ("none", "0"), ("2.5 m.", "2.5 m"), ("yes, it is", "yes it is"),
    ],
)  # fmt: skip
def test_answers_are_normalized_as_in_vqa(text: str, normal: str) -> None:
    assert vqa_normalized(text) == normal


def test_numbers_and_yes_are_read_from_texts() -> None:
    assert [as_number(text) for text in ("-3.5", "1,200", "12 %", "3 cars", "")] == [-3.5, 1200, 0.12, None, None]
    said = [yes_or_no(text) for text in ("Yes.", "No, there is none.", "There is not. Yes.", "A dog", "")]
    assert said == [True, False, False, True, None]


def test_overlap_is_that_of_torchvision() -> None:
    boxes = torch.randint(0, 40, (30, 4), generator=torch.Generator().manual_seed(0)).float()
    boxes[:, 2:] += boxes[:, :2] + 1
    ours = [overlap(tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(boxes[:15], boxes[15:], strict=True)]
    assert ours == pytest.approx(box_iou(boxes[:15], boxes[15:]).diagonal().tolist())


def scores_of(name: str, replies: list[Reply]) -> Scores:
    """Scores of replies, one image each."""
    counts = np.array([find_metric(name).of_reply(reply) for reply in replies])
    return Scores(("all",), np.ones((len(replies), 1)), {name: tuple(column[:, None] for column in counts.T)}, name)


def test_bleu_is_that_of_the_corpus_in_every_draw() -> None:
    texts = [
        "the cat sat on the mat today",
        "a dog runs in the park now",
        "two red cars on a long road",
        "it is a boat",
    ]
    wanted = ["the cat sat on a mat today", "a dog runs through the park now", "two red cars on a road", "a ship"]
    replies = [Reply(text, (reference, "some other words")) for text, reference in zip(texts, wanted, strict=True)]
    scores, library = scores_of("bleu", replies), BLEUScore()
    library.update(texts, [list(reply.references) for reply in replies])
    assert scores.score == pytest.approx(float(library.compute()), rel=1e-5)
    some = scores_of("bleu", replies[:2] * 2)
    assert some.score == pytest.approx(scores_of("bleu", replies[:2]).score)
    assert scores.ci95 > 0
    assert scores_of("bleu", replies[:1] * 5).ci95 == 0
    assert np.isnan(scores.with_learnt([]).score)


def test_the_pope_set_is_that_of_a_confusion_matrix() -> None:
    said, wanted = (
        ["yes", "no", "Yes,", "yes", "no", "no", "yes", "no"],
        ["yes", "yes", "no", "yes", "no", "no", "yes", "no"],
    )
    replies = [Reply(text, (reference,)) for text, reference in zip(said, wanted, strict=True)]
    hits = sum(a[:1].lower() == "y" == b[:1] for a, b in zip(said, wanted, strict=True))
    right = sum(a[:1].lower() == b[:1] for a, b in zip(said, wanted, strict=True))
    yes, positive = sum(a[:1].lower() == "y" for a in said), wanted.count("yes")
    precision, recall = hits / yes, hits / positive
    expected = {
        "pope_accuracy": right / 8, "pope_precision": precision, "pope_recall": recall, "pope_yes_rate": yes / 8,
        "pope_f1": 2 * precision * recall / (precision + recall),
    }  # fmt: skip
    assert {name: scores_of(name, replies).score for name in expected} == pytest.approx(expected)


def test_a_metric_comes_by_dotted_path() -> None:
    for path in (f"{__name__}:Longest", f"{__name__}.Longest"):
        assert find_metric(path).of_reply(Reply("abc", ("ab",))) == (3, 2)
    for path, message in (
        ("no.such:Thing", "Metric 'no.such:Thing' cannot be imported"),
        (f"{__name__}:Missing", "give the dotted path of its class"),
        ("builtins:dict", "'builtins:dict' is not a Metric; subclass"),
        ("cider", "No metric 'cider': torchmetrics has no CIDEr"),
    ):
        with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
            find_metric(path)
