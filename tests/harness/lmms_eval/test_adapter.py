"""The model of lmms-eval against a stub of its base class: every request type, counts, settings, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.conftest import PLAN
from harness.lmms_eval.stub import Request

from tpcompress.data.prompts import prompt_inputs
from tpcompress.harness.lmms_eval import manifests
from tpcompress.harness.lmms_eval import model as classes
from tpcompress.harness.lmms_eval.adapter import device_of_rank
from tpcompress.harness.served import ModelSettings, Served
from tpcompress.insertion.attach import attach
from tpcompress.models import load_base, load_processor

Load = Callable[..., Any]
GREEDY = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": 1.0, "until": ["\n\n"]}
NUMBERS = range(6)


def messages(doc: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]


def chat(settings: dict[str, Any] = GREEDY, to_messages: Any = messages, numbers: Any = NUMBERS) -> list[Request]:
    return [Request(("", to_messages, dict(settings), number, "shapes", "test")) for number in numbers]


def simple(docs: list[dict[str, Any]], settings: dict[str, Any] = GREEDY) -> list[Request]:
    return [
        Request((doc["question"], dict(settings), lambda doc: doc["images"], number, "shapes", "test"))
        for number, doc in enumerate(docs)
    ]


def texts(results: list[Any]) -> list[str]:
    return [result.text for result in results]


def own_answers(docs: list[dict[str, Any]], plan: str | None) -> list[str]:
    """Answers of our own `generate`, one prompt at a time."""
    model: Any = load_base("tiny_llava").eval()
    processor = load_processor("tiny_llava")
    if plan is not None:
        attach(model, plan)
    found = []
    for doc in docs:
        inputs = prompt_inputs(processor, doc["question"], doc["images"])
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


def test_manifest_names_classes_of_both_kinds(logged: Any) -> None:
    (manifest,) = manifests()
    assert manifest.model_id == "tpcompress"
    for path, is_simple in ((manifest.chat_class_path, False), (manifest.simple_class_path, True)):
        module, _, name = path.rpartition(".")
        assert module == classes.__name__
        assert getattr(classes, name).is_simple is is_simple
    with pytest.raises(AttributeError, match="no attribute Other"):
        _ = classes.Other


@pytest.mark.parametrize("plan", [None, PLAN])
@pytest.mark.parametrize("size", [1, 4])
def test_answers_equal_our_own_generate(loaded: Load, docs: list[dict[str, Any]], plan: str | None, size: int) -> None:
    model = loaded(batch_size=size, **({} if plan is None else {"plan": plan}))
    results = model.generate_until(chat())
    assert texts(results) == own_answers(docs, plan)
    assert sum(text == doc["answer"] for text, doc in zip(texts(results), docs, strict=True)) >= 3
    counts = [result.token_counts.to_dict() for result in results]
    kept = 144 if plan is None else 16
    assert [(c["vision_tokens"], c["retained_tokens"]) for c in counts] == [
        (144, kept) if doc["images"] else (0, 0) for doc in docs
    ]
    assert all(1 <= c["output_tokens"] <= 6 for c in counts)
    words = [c["input_tokens"] - c["retained_tokens"] for c in counts]
    assert all(0 < number < 30 for number in words)


def test_both_kinds_of_tasks_agree(loaded: Load, docs: list[dict[str, Any]]) -> None:
    by_messages = loaded(batch_size=4, plan=PLAN).generate_until(chat())
    by_text = loaded("TpcompressSimple", batch_size=4, plan=PLAN).generate_until(simple(docs))
    assert texts(by_text) == texts(by_messages)


def test_means_are_logged_per_prompt_with_an_image(loaded: Load, logged: list[dict[str, Any]]) -> None:
    logged.clear()
    loaded(batch_size=4, plan=PLAN).generate_until(chat())
    assert [entry["additional_metrics"] for entry in logged] == [{"vision_tokens": 144.0, "retained_tokens": 16.0}]
    assert logged[0]["total_gen_tokens"] >= 6


def test_a_plan_that_prunes_nothing_is_said(loaded: Load, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("tpcompress.harness.lmms_eval.log.find_spec", lambda name: None)
    loaded(batch_size=4, plan="divprune:1.0").generate_until(chat())
    assert "divprune:1@0 prunes nothing on shapes" in caplog.text
    caplog.clear()
    loaded(batch_size=4, plan=PLAN).generate_until(chat())
    assert "prunes nothing" not in caplog.text


def test_settings_of_requests_are_kept_apart(loaded: Load) -> None:
    model = loaded(batch_size=4, plan=PLAN)
    short, long = {**GREEDY, "max_new_tokens": 1}, {**GREEDY, "max_new_tokens": 6}
    mixed = [request for pair in zip(chat(short), chat(long), strict=True) for request in pair]
    results = model.generate_until(mixed)
    assert all(result.token_counts.output_tokens == 1 for result in results[::2])
    assert texts(results[1::2]) == texts(model.generate_until(chat(long)))
    assert texts(results[1::2]) != texts(results[::2])


def test_stop_texts_beams_and_sampling(loaded: Load) -> None:
    model = loaded(batch_size=4, plan=PLAN)
    whole = texts(model.generate_until(chat()))
    place = next(number for number, text in enumerate(whole) if " " in text)
    stopped = texts(model.generate_until(chat({**GREEDY, "until": [whole[place].split()[1]]})))
    assert stopped[place] == whole[place].split()[0]
    beams = model.generate_until(chat({**GREEDY, "num_beams": 3}))
    assert [r.token_counts.retained_tokens for r in beams] == [16, 16, 16, 16, 0, 16]
    assert sum(a == b for a, b in zip(texts(beams), whole, strict=True)) >= 4
    hot = {"max_new_tokens": 6, "temperature": 50.0}
    torch.manual_seed(0)
    first = texts(model.generate_until(chat(hot)))
    assert first != whole
    torch.manual_seed(0)
    assert texts(model.generate_until(chat(hot))) == first


def test_rounds_follow_the_task(loaded: Load, docs: list[dict[str, Any]]) -> None:
    seen: list[tuple[int, list[str], Any]] = []

    def to_messages(
        doc: dict[str, Any], round_idx: int = 0, previous_output: Any = (), previous_round_info: Any = None
    ):  # noqa: E501, ANN202
        if not round_idx:
            return messages(doc)
        seen.append((round_idx, list(previous_output), previous_round_info))
        rounds = 3 if doc is docs[0] else 2
        return (messages(doc), False, None, round_idx) if round_idx < rounds else (None, True, None, None)

    model = loaded(batch_size=4, plan=PLAN)
    told = model.generate_until_multi_round(chat(to_messages=to_messages, numbers=[0, 1]))
    alone = texts(model.generate_until(chat(numbers=[0, 1])))
    assert told == [[alone[0]] * 3, [alone[1]] * 2]
    assert (2, [alone[0]] * 2, 1) in seen

    def to_text(doc: dict[str, Any], previous_output: Any, round_idx: int, previous_round_info: Any) -> Any:
        return doc["images"], doc["question"], round_idx == 2, previous_output, round_idx

    requests = [
        Request((doc["question"], dict(GREEDY), lambda doc: doc["images"], to_text, number, "shapes", "test"))
        for number, doc in enumerate(docs[:2])
    ]
    by_text = loaded("TpcompressSimple", batch_size=4, plan=PLAN).generate_until_multi_round(requests)
    assert by_text == [[alone[0]] * 2, [alone[1]] * 2]


def test_choices_have_losses_and_targets_likelihoods(loaded: Load, docs: list[dict[str, Any]]) -> None:
    results = {}
    for size in (1, 4):
        model = loaded("TpcompressSimple", batch_size=size, plan=PLAN)
        requests = [
            Request((doc["question"], choice, lambda doc: doc["images"], number, "shapes", "test"))
            for number, doc in enumerate(docs)
            if doc["images"]
            for choice in (doc["answer"], "dots dots")
        ]
        results[size] = model.loglikelihood(requests)
    losses, together = ([value for value, _ in results[size]] for size in (1, 4))
    assert losses == pytest.approx(together, abs=1e-4)
    assert all(loss > 0 for loss in losses)
    right = [a < b for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert sum(right) >= 4
    generated = texts(loaded(batch_size=4, plan=PLAN).generate_until(chat()))
    greedy = [is_greedy for _, is_greedy in results[1][::2]]
    shown = [number for number in NUMBERS if docs[number]["images"]]
    assert greedy == [generated[number] == docs[number]["answer"] for number in shown]
    target = Request(("", lambda doc: doc["answer"], lambda doc: doc["images"], 0, "shapes", "test"))
    target.args = (docs[0]["question"], *target.args[1:])
    ((value, _),) = model.loglikelihood([target])
    assert value < 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 4, "image_aspect_ratio": "pad"}, "image_aspect_ratio='pad' is not supported"),
        ({"max_new_token": 4}, "Did you mean max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"until": [3]}, "until is a list of texts"),
        ({"max_gen_toks": 3, "max_new_tokens": 4}, "given twice"),
    ],
)
def test_unsupported_settings_are_refused(loaded: Load, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loaded(batch_size=4, plan=PLAN).generate_until(chat(settings))


def test_settings_can_be_left_out_on_purpose(loaded: Load) -> None:
    model = loaded(batch_size=4, plan=PLAN, ignore_gen_kwargs="image_aspect_ratio+seed")
    assert len(model.generate_until(chat({**GREEDY, "image_aspect_ratio": "pad", "seed": 3}))) == 6


def test_errors_are_raised_and_name_the_request(loaded: Load) -> None:
    model = loaded(batch_size=4, plan=PLAN)

    def with_part(part: dict[str, Any]) -> Any:
        return lambda doc: [{"role": "user", "content": [part, {"type": "text", "text": "what ?"}]}]

    cases = [
        (with_part({"type": "audio", "url": "a.wav"}), "shapes 0: no audio support"),
        (with_part({"type": "text", "text": "see <image> here"}), "shapes 0: a text holds the mark .* --force_simple"),
        (with_part({"type": "video", "url": "a.mp4", "start_time": 1.0}), "parts of a video"),
        (with_part({"type": "image", "url": "no/such.png"}), "shapes 0 cannot be encoded: missing image"),
        (lambda doc: [{"role": "user"}], "no messages with role and content"),
    ]
    for to_messages, words in cases:
        with pytest.raises(ValueError, match=words):
            model.generate_until(chat(to_messages=to_messages, numbers=[0]))

    def broken(doc: dict[str, Any]) -> Any:
        raise RuntimeError("a fault of the task")

    with pytest.raises(RuntimeError, match="a fault of the task"):
        model.generate_until(chat(to_messages=broken))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"plann": PLAN}, "no argument plann; Did you mean plan"),
        ({"pretrained": "no_such_model"}, "No model at 'no_such_model'"),
        ({"plan": "divprun:16"}, "divprun"),
        ({"keep_tokens": 8}, "a base without a plan"),
        ({"plan": PLAN, "dense": True}, "plan and dense exclude each other"),
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"max_pixels": 1000}, "processors that keep the size"),
    ],
)
def test_mistakes_in_arguments(loaded: Load, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loaded(**arguments)


def test_clean_releases_the_model(loaded: Load) -> None:
    model = loaded(batch_size=2, plan=PLAN)
    assert model.device == torch.device("cpu")
    assert model.batch_size == 2
    model.clean()
    assert model.cleaned
    with pytest.raises(ValueError, match="released"):
        _ = model.device


def test_dense_is_described_as_dense() -> None:
    assert Served.load(ModelSettings("tiny_llava", device="cpu")).description.endswith("it runs dense.")


def test_processes_take_the_accelerator_of_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [device_of_rank(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert device_of_rank("cuda") == "cuda"
