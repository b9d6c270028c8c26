"""Compiled decoder layers: equal outputs, and nothing is compiled anew from one step to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from exact import tolerance
from structure import some
from subjects import Subject
from support import answer_labels, case_id, generate, gradients, logit_gap, model_cases, tiny_model
from torch._dynamo.testing import CompileCounter

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach
from tpcompress.insertion.plan import Stage

# Plain layers, and states besides attention. Other structures (M-RoPE, two masks) compile for minutes: `--all`.
QUICK = (("llava-clip_vision_model", "compile"), ("lfm2_vl-lfm2", "compile"))
# Its experts loop over the tokens they got: without a plan, too, the second step compiles one frame more.
SETTLES_LATER = ("ernie4_5_vl_moe",)
STAGES = [Stage("pool", 0, keep_ratio=0.5), Stage("divprune", 2, keep_ratio=0.3)]
SAMPLES: list[Any] = [(5, 1, 9), (4, 0, 7)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    # The layers of a family share one code: what differs between them (kinds, states of a cache) adds up.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def compiled(model: Any, how: str = "compile") -> CompileCounter:
    """Compile the decoder layers of a model, hooks included or only what they stand around."""
    counter = CompileCounter()
    for layer in resolve(model).layers:
        if how == "compile":
            layer.compile(backend=counter)
        else:
            layer.forward = torch.compile(layer.forward, backend=counter)
    return counter


def pruned_pair(subject: Subject) -> tuple[Any, Any]:
    """The attached model, and another like it to compile: what is compiled stays so."""
    other = tiny_model(subject.case[0], *subject.case[1])
    plan = subject.plan(STAGES)
    return attach(subject.model, plan), attach(other, plan)


@pytest.mark.parametrize(
    ("subject", "how"),
    [
        pytest.param(
            case, how, id=f"{case_id(case)}-{how}", marks=() if (case_id(case), how) in QUICK else pytest.mark.slow
        )
        for case in model_cases()
        for how in ("compile", "forward")
    ],
    indirect=["subject"],
)
def test_steps_of_one_shape_compile_once(subject: Subject, how: str) -> None:
    model, other = pruned_pair(subject)
    batches = [subject.batch(*SAMPLES, seed=seed) for seed in range(3)]
    spare = subject.case[0] in SETTLES_LATER
    counter, frames = compiled(other, how), [0]

    def train(which: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = which.train()(**inputs, labels=answer_labels(inputs), use_cache=False).loss
        loss.backward()
        return loss.detach(), gradients(which)

    for inputs in batches:
        (loss, expected), (again, found) = train(model, inputs), train(other, inputs)
        assert torch.equal(loss, again)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], g) for name, g in expected.items())
        frames.append(counter.frame_count)
    assert 0 < frames[1] <= frames[2] == frames[3] <= frames[1] + spare, frames
    for inputs in batches:
        with torch.no_grad():
            plain, out = (which.eval()(**inputs, use_cache=False).logits for which in (model, other))
        assert torch.equal(plain, out)
        frames.append(counter.frame_count)
    assert frames[4] <= frames[5] == frames[6] <= frames[4] + spare, frames


@some("llava-clip_vision_model")
def test_decoding_into_a_static_cache_compiles_once(subject: Subject) -> None:
    if subject.case[0] in SETTLES_LATER:
        pytest.skip("its experts compile anew for other words, without a plan as well")
    model, other = pruned_pair(subject)
    inputs, options = subject.batch(*SAMPLES), {"cache_implementation": "static", "disable_compile": True}
    expected = generate(model, inputs, new=4, **options)
    counter, frames = compiled(other), []
    handle = other.register_forward_hook(lambda *_: frames.append(counter.frame_count))
    for _ in range(2):
        out = generate(other, inputs, new=4, **options)
        assert torch.equal(out.sequences, expected.sequences)
        assert logit_gap(out, expected) < tolerance(model)
    handle.remove()
    prefill, first, *later = frames
    assert 0 < prefill < first, "control: a step is another shape than the prompt"
    assert set(later) == {first}, frames
