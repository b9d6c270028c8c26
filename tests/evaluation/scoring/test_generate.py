"""Generation: its settings, its references, and the confidence of answers."""

from __future__ import annotations

import numpy as np
import pytest

from tpcompress.evaluation.scoring.batches import prepare_prompts, questions_of
from tpcompress.evaluation.scoring.evaluate import evaluate
from tpcompress.evaluation.scoring.generate import Generation, evaluate_by_generation
from tpcompress.evaluation.tasks import create_task


@pytest.fixture
def few(rows):
    return [rows[index] for index in range(2)]


def test_answers_are_counted_against_every_reference(vqa, processor, few):
    said = evaluate_by_generation(vqa, processor, few).questions.answer_Q
    number = iter(said)
    given = [dict(row, references=[["?", str(next(number))] for _ in row["conversations"]]) for row in few]
    scores = evaluate_by_generation(vqa, processor, given, metric="vqa_accuracy")
    assert scores.score == 1
    assert set(scores.sums) == {"vqa_accuracy", "exact_match"}
    assert evaluate_by_generation(vqa, processor, [dict(r, references=None) for r in few]).score < 1


def test_confidence_is_that_of_teacher_forcing_where_answers_are_right(vqa, processor, few):
    forced, free = (
        evaluate(vqa, processor, few, pack=False).questions,
        evaluate_by_generation(vqa, processor, few).questions,
    )
    assert forced.same_as(free)
    assert (forced.right_Q == free.right_Q).all()
    assert forced.right_Q.any()
    right = forced.right_Q
    np.testing.assert_allclose(forced.confidence_Q[right], free.confidence_Q[right], rtol=1e-4)


def test_prepared_prompts_and_stop_texts(vqa, processor, few):
    prepared = prepare_prompts(processor, few, batch_size=3)
    assert sum(map(len, prepared.asked)) == sum(len(row["families"]) for row in few)
    plain = evaluate_by_generation(vqa, processor, prepared).questions.answer_Q
    stop = max(plain, key=len)[1:]
    settings = Generation(max_new_tokens=4, batch_size=3, stop=(stop,))
    cut = evaluate_by_generation(vqa, processor, few, generation=settings).questions.answer_Q
    assert all(stop not in text for text in cut)
    assert any(a != b for a, b in zip(plain, cut, strict=True))


def test_questions_are_those_of_the_conversations():
    turns = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "a"}]
    turns += [{"role": "user", "content": "second"}, {"role": "assistant", "content": "b"}]
    (asked,) = questions_of({"conversations": [turns]})
    assert (asked.prompt, asked.references) == ("second", ("b",))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"generate": {"max_new": 3}}, "generate is a mapping with max_new_tokens, batch_size, stop"),
        ({"generate": {"batch_size": 0}}, "generate.batch_size must be a whole number of at least 1, got 0"),
        ({"generate": {"stop": [""]}}, "generate.stop is a list of texts"),
        ({"generate": True, "metric": "log_likelihood"}, "log_likelihood reads logits"),
        ({"metric": "anl"}, "No metric 'anl'"),
    ],
)
def test_wrong_settings_are_one_line(config, message):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        create_task({"type": "benchmark", **config})


def test_settings_survive_the_config_of_a_task():
    task = create_task({"type": "benchmark", "metric": "anls", "generate": {"stop": "\n"}, "label": "docs"})
    assert (task.title, task.generation().stop) == ("docs", ("\n",))
    assert create_task(task.config()).config() == task.config()
    assert create_task({"type": "benchmark", "metric": "anls"}).generation() == Generation()
    assert create_task("benchmark").generation() is None
