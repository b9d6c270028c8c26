"""One attached model serves several threads and asyncio tasks; settings and calls belong to the context they are in."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import answer_labels, batch, generate, tiny_model
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tpcompress.insertion.answers import answers
from tpcompress.insertion.attach import (
    ATTACHED,
    attach,
    attachment_of,
    budgets,
    detach,
    force_retain,
    layers,
    mode,
    record,
)
from tpcompress.insertion.plan import Budget, PruningPlan, Stage

THREADS = 8
ROUNDS = 3
SAMPLES: list[Any] = [[(5, 1, 7)], [(3, 2, 8), (4, 0, 9)], [(9, 2, 4)], [(4, 1, 5), (6, 1, 3)]]
PLAN = PruningPlan([Stage("divprune", 0, keep_tokens=30), Stage("fastv", 2, keep_tokens=9)])
PLANS = {
    "llava": PLAN,
    "qwen2_5_vl": PruningPlan([Stage("uniform", 0, keep_ratio=0.5), Stage("fastv", 2, keep_ratio=0.2)]),
    "gemma3": PruningPlan([Stage("divprune", 0, keep_ratio=0.5), Stage("pool", 2, keep_ratio=0.2)]),
    "tower": PruningPlan([Stage("visionzip", 0, keep_tokens=9)]),
}


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Run jobs at the same time, each in a new thread that starts when all are there."""
    gate = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        gate.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


def forward(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def attached(family: str) -> tuple[Any, list[dict[str, Any]]]:
    model = tiny_model("llava" if family == "tower" else family)
    attach(model, PLANS[family])
    name = "llava" if family == "tower" else family
    return model, [batch(samples, seed=i, family=name, config=model.config) for i, samples in enumerate(SAMPLES)]


def nothing_left(model: Any) -> bool:
    """No call, setting or encoder of this context is open."""
    attachment = attachment_of(model)
    return attachment.request is None and attachment.settings is attachment.defaults and not attachment.tower.is_open


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name == "gemma3" else ()) for name in PLANS]
)
def test_threads_equal_one_thread(family: str) -> None:
    model, inputs = attached(family)
    logits = [forward(model, one) for one in inputs]
    tokens = [generate(model, one).sequences for one in inputs]
    assert logits[0].shape[1] < inputs[0]["input_ids"].shape[1], "control: the model is pruned"

    def serve(number: int) -> list[bool]:
        found = []
        for turn in range(ROUNDS):
            which = (number + turn) % len(inputs)
            found.append(torch.equal(forward(model, inputs[which]), logits[which]))
            found.append(torch.equal(generate(model, inputs[which]).sequences, tokens[which]))
        return [*found, nothing_left(model)]

    results = in_threads([lambda number=number: serve(number) for number in range(THREADS)])
    assert all(all(result) for result in results), results
    assert all(torch.equal(forward(model, one), expected) for one, expected in zip(inputs, logits, strict=True))


def test_settings_and_records_hold_in_their_thread(model: Any) -> None:
    """Modes, budgets, layers, forced tokens and records of eight threads, all different, on one model."""
    attach(model, PLAN)
    inputs = batch([(5, 1, 7), (4, 1, 5)])
    with record(model) as first:
        forward(model, inputs)

    def widths(number: int) -> list[int]:
        """Retained tokens of three calls, or the length of the sequence where nothing is recorded."""
        few = [Budget(keep_tokens=20 - number), Budget(keep_tokens=8 - number)]
        found = []
        for _ in range(ROUNDS):
            if number % 4 == 0:
                with mode(model, "off"), record(model) as trace:
                    found.append(forward(model, inputs).shape[1])
                assert not trace.stages
            elif number % 4 == 1:
                with budgets(model, few), record(model) as trace:
                    forward(model, inputs)
                found += trace.stages[-1].vision_out
            elif number % 4 == 2:
                with layers(model, [1, number]), record(model) as trace:
                    forward(model, inputs)
                found += [stage.layer for stage in trace.stages]
            else:
                with force_retain(model, first), budgets(model, [Budget(keep_tokens=40)] * 2), record(model) as trace:
                    forward(model, inputs)
                assert not (first.stages[-1].retained_RV & ~trace.stages[-1].retained_RV).any()
                found += trace.stages[-1].vision_out
            assert len(trace.stages) in (0, 2)
        return found

    alone = [widths(number) for number in (0, 1, 2, 3, 4, 5, 3, 7)]
    with record(model) as ours:
        together = in_threads([lambda number=number: widths(number) for number in (0, 1, 2, 3, 4, 5, 3, 7)])
    assert together == alone
    assert len({tuple(found) for found in alone}) > 4, "control: the threads differ"
    assert not ours.stages, "a record collects the calls of its own thread"
    assert len(first.stages) == 2
    assert nothing_left(model)


def test_a_new_thread_runs_under_the_settings_of_attach(model: Any) -> None:
    attach(model, PLAN, mode="mask")
    inputs, seen = batch([(5, 1, 7)]), []
    job = lambda: seen.append(attachment_of(model).settings.mode)  # noqa: E731
    with mode(model, "off"):
        for run in (job, lambda: contextvars.copy_context().run(job)):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(job,))
    thread.start()
    thread.join()
    assert seen == ["mask", "mask", "off"], "only a context that was copied in the block has its settings"
    assert attachment_of(model).settings.mode == "mask"
    assert forward(model, inputs).shape[1] == inputs["input_ids"].shape[1]


def test_asyncio_tasks_and_threads_inherit_their_callers_settings(model: Any) -> None:
    attach(model, PLAN)
    inputs = batch([(5, 1, 7)])
    expected = {name: _under(model, name, inputs) for name in ("drop", "mask", "off")}

    async def request(name: str) -> Tensor:
        with mode(model, name):
            await asyncio.sleep(0)  # the other tasks enter their blocks
            return await asyncio.to_thread(forward, model, inputs)

    async def serve() -> list[Tensor]:
        return await asyncio.gather(*(request(name) for name in ("drop", "mask", "off") * 4))

    found = asyncio.run(serve())
    for name, logits in zip(("drop", "mask", "off") * 4, found, strict=True):
        assert torch.equal(logits, expected[name])
    assert expected["drop"].shape != expected["off"].shape, "control"
    assert nothing_left(model)


def _under(model: Any, name: str, inputs: dict[str, Any]) -> Tensor:
    with mode(model, name):
        return forward(model, inputs)


class Queue(BaseStreamer):
    """Collects the tokens of a generation while it runs."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_streaming(model: Any) -> None:
    """Every stream runs `generate` in a thread, as `TextIteratorStreamer` has it."""
    attach(model, PLAN)
    inputs = [batch([(5, 1, 7)], seed=seed) for seed in range(4)]
    expected = [generate(model, one).sequences[0].tolist() for one in inputs]
    streams = [Queue() for _ in inputs]
    threads = [
        threading.Thread(target=generate, args=(model, one), kwargs={"streamer": stream})
        for one, stream in zip(inputs, streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [stream.tokens for stream in streams] == expected


def test_training_steps_in_threads(model: Any) -> None:
    """Labels, shortened losses and `answers` of one thread do not reach another."""
    attach(model, PLAN)
    inputs = [batch([(5, 1, 7)], seed=seed) for seed in range(4)]
    labels = [answer_labels(one, words=2 + i) for i, one in enumerate(inputs)]

    def loss(number: int) -> tuple[Tensor, Any]:
        with torch.no_grad():
            if number % 2:
                with answers(model) as found:
                    value = model(**inputs[number % 4], labels=labels[number % 4]).loss
                return value, found.logits_AC.shape[0]
            return model(**inputs[number % 4], labels=labels[number % 4]).loss, 0

    expected = [loss(number) for number in range(THREADS)]
    assert [count for _, count in expected] == [0, 3, 0, 5] * 2
    for _ in range(ROUNDS):
        found = in_threads([lambda number=number: loss(number) for number in range(THREADS)])
        for (a, m), (b, n) in zip(found, expected, strict=True):
            assert torch.equal(a, b)
            assert m == n
    assert "labels" not in vars(attachment_of(model))


class Stop(BaseException):
    """Like KeyboardInterrupt, no Exception; one that the test runner does not take as its own."""


def failing(error: type[BaseException]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error("out")

    return fail


@pytest.mark.parametrize(
    ("error", "call"),
    [
        # What interrupts is no Exception; how it leaves a call does not depend on the call.
        pytest.param(error, call, marks=() if error is RuntimeError or call == "generate" else pytest.mark.slow)
        for error in (RuntimeError, KeyboardInterrupt, Stop)
        for call in ("forward", "generate", "core", "encoder")
    ],
)
@pytest.mark.parametrize("place", ["tower", "projector", "pruner", "layer", "head", "encoder note"])
def test_a_call_that_fails_leaves_nothing(
    model: Any, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException], call: str
) -> None:
    attach(model, PLAN)
    inputs = batch([(5, 1, 7)])
    expected, tokens = forward(model, inputs), generate(model, inputs).sequences
    attachment = attachment_of(model)
    module, name = {
        "tower": (model.model.vision_tower, "forward"),
        "projector": (model.model.multi_modal_projector, "forward"),
        "pruner": (attachment.pruners[1], "forward"),
        "layer": (model.model.language_model.layers[3], "forward"),
        "head": (model.lm_head, "forward"),
        "encoder note": (attachment.tower, "values"),
    }[place]
    run = {
        "forward": lambda: forward(model, inputs),
        "generate": lambda: generate(model, inputs),
        "core": lambda: model.model(**inputs),
        "encoder": lambda: model.model.get_image_features(inputs["pixel_values"]),
    }[call]
    reached = place in ("tower", "projector", "encoder note") or call != "encoder"
    reached = reached and not (place == "head" and call == "core")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(error), raising=True)
        if reached:
            with pytest.raises(error, match="out"), mode(model, "drop"), record(model):
                run()
        else:
            run()
    assert not attachment.tower.is_open
    assert attachment.settings is attachment.defaults
    # An interrupted call of the core model alone cannot end itself: the next call replaces it.
    assert attachment.request is None or (call == "core" and not issubclass(error, Exception))
    assert torch.equal(forward(model, inputs), expected)
    assert torch.equal(generate(model, inputs).sequences, tokens)
    assert nothing_left(model) or call == "core"
    with torch.no_grad():
        text = batch([(4, 0, 5)])
        detach(model)
        plain = forward(model, text)
        attach(model, PLAN)
        assert torch.equal(forward(model, text), plain)


def test_a_failing_thread_does_not_disturb_the_others(model: Any) -> None:
    attach(model, PLAN)
    inputs = batch([(5, 1, 7)])
    expected = forward(model, inputs)
    bad = {**inputs, "pixel_values": inputs["pixel_values"][:, :1]}

    def serve(number: int) -> bool:
        for _ in range(ROUNDS):
            if number % 2:
                with pytest.raises(RuntimeError):
                    forward(model, bad)
            elif not torch.equal(forward(model, inputs), expected):
                return False
        return nothing_left(model)

    assert all(in_threads([lambda number=number: serve(number) for number in range(THREADS)]))
    assert torch.equal(forward(model, inputs), expected)


def test_hooks_of_moved_layers_go_with_the_last_thread(model: Any) -> None:
    attach(model, PruningPlan([Stage("divprune", 0, keep_tokens=11)]))
    hooks, inside, leave = getattr(model, ATTACHED), threading.Barrier(3), threading.Barrier(3)

    def move(layer: int) -> None:
        with layers(model, [layer]):
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=move, args=(layer,)) for layer in (4, 3)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert sorted(hooks.layer_handles) == [3, 4, 5]
    leave.wait()
    for thread in threads:
        thread.join()
    assert not hooks.layer_handles
