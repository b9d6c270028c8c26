"""The ideal is the same computation, FLOPs are equal, and what measures is right."""

from __future__ import annotations

import runpy
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench.models import MODELS, Shape
from bench.prefill import LiveTensors, Ratio, flops, interleaved, make_cases, measure, peak_bytes

from tpcompress.insertion.cache import held_columns
from tpcompress.insertion.cost import decoder_flops

ROOT = Path(__file__).resolve().parents[2]
TOY = Shape(layers=4, width=64, heads=4, mlp=96, vocab=100, side=6, text=10)
KEEP = 9


def case(model: str, layer: int, pruner: str = "random", **more):
    return make_cases(model, TOY, pruner, (layer,), (KEEP,), **more)[0]


@torch.no_grad()
def logits(run) -> torch.Tensor:
    out = run()
    return out[0] if isinstance(out, tuple) else out.logits


@pytest.mark.parametrize(
    ("model", "layer", "positions"),
    [("llava", 0, "compact"), ("llava", 2, "original"), ("qwen", 2, "original")],
)
def test_the_ideal_computes_the_very_same(model, layer, positions):
    """A stage before Qwen's language model keeps places of the whole image, which no image of nine tokens has."""
    one = case(model, layer, positions=positions)
    assert torch.equal(logits(one.pruned), logits(one.ideal))
    assert (logits(one.full) - logits(one.ideal)).abs().max() > 0.01


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("pruner", ["random", "uniform", "pool"])
def test_flops_are_those_of_the_ideal_and_the_pruners_own(model, layer, pruner):
    one = case(model, layer, pruner)
    width = one.full.func.config.get_text_config().hidden_size
    own = 2 * KEEP * TOY.side**2 * width if pruner == "pool" else 0  # the means of its cells
    assert flops(one.pruned) == flops(one.ideal) + own
    assert flops(one.ideal) < flops(one.full)


@pytest.mark.parametrize("model", MODELS)
def test_counted_flops_are_those_of_the_formula(model):
    one, long, short = case(model, 2), TOY.side**2 + TOY.text, KEEP + TOY.text
    config = one.full.func.config
    assert flops(one.full) == decoder_flops(config, [long] * 4, head_tokens=1)
    assert flops(one.ideal) == decoder_flops(config, [long, long, short, short], head_tokens=1)


@pytest.mark.parametrize("model", MODELS)
def test_caches_of_pruned_and_ideal_have_equal_lengths(model):
    with torch.no_grad():
        pruned, (_, ideal) = case(model, 2).pruned().past_key_values, case(model, 2).ideal()
    long, short = TOY.side**2 + TOY.text, KEEP + TOY.text
    assert [held_columns(pruned, i) for i in range(4)] == [held_columns(ideal, i) for i in range(4)]
    assert [held_columns(ideal, i) for i in range(4)] == [long, long, short, short]


def test_live_tensors_are_counted_while_they_live():
    with LiveTensors() as live:
        a = torch.ones(1000)
        a.add_(1).view(10, 100)
        b = a * 2
        del a
        c = b + 1
        del b, c
        torch.ones(10)
    assert live.peak == 2 * 4000


def test_peak_memory_of_a_stage_is_nearer_to_the_ideal_than_to_the_full_length():
    one = case("llava", 0)
    full, pruned, ideal = (peak_bytes(run, "cpu") for run in (one.full, one.pruned, one.ideal))
    assert ideal <= pruned < (ideal + full) / 2


def test_runs_take_turns():
    seen = []
    taken = interleaved([partial(seen.append, name) for name in "abc"], repeats=3, warm_up=1)
    assert "".join(seen) == "cbaabccbaabc"
    assert [len(one) for one in taken] == [3, 3, 3]


def test_processor_time_does_not_count_waiting():
    (taken,) = interleaved([lambda: time.sleep(0.05)], repeats=1, warm_up=0)
    assert taken[0].wall > 0.04
    assert taken[0].cpu < 0.04


def test_a_ratio_is_of_pairs_and_knows_its_noise():
    below = [1.0, 2.0, 4.0, 8.0, 16.0]
    same = Ratio.of([1.1 * x for x in below], below)
    assert (same.median, same.low, same.high) == pytest.approx((1.1, 1.1, 1.1))
    wide = Ratio.of([0.5, 2.0, 6.0, 8.0, 32.0], below)
    assert wide.low < wide.median < wide.high
    assert str(Ratio(1.0, 0.98, 1.0251)) == "1.000 [0.980, 1.025]"


def test_only_a_ratio_above_the_limit_beyond_noise_fails():
    one = measure(case("llava", 2), 2, "cpu", "cpu")
    assert one.flops[1] == one.flops[2]
    assert type(one).ok.fget(SimpleNamespace(ratio=Ratio(1.07, 1.04, 1.1)))
    assert not type(one).ok.fget(SimpleNamespace(ratio=Ratio(1.07, 1.06, 1.1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 65}, "width 65 with 4 heads gives a head size of 16.25"),
        ({"heads": 8}, "choose a multiple of 128"),
        ({"text": 3}, "text must be at least 4"),
    ],
)
def test_shapes_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        Shape(**(vars(TOY) | change))


def test_cases_that_cannot_be():
    with pytest.raises(ValueError, match="No model 'gpt' in this benchmark; choose one of llava, qwen"):
        case("gpt", 0)
    with pytest.raises(ValueError, match="keep 36 of 36 vision tokens drops nothing"):
        make_cases("llava", TOY, "random", (0,), (9, 36))


def test_the_script_prints_one_table(monkeypatch, capsys):
    size = [f"--{name}={value}" for name, value in vars(TOY).items()]
    monkeypatch.setattr(sys, "argv", ["bench", *size, "--keep", "9", "--repeats", "2", "--pruner", "random"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts/bench_prefill.py"), run_name="__main__")
    assert stop.value.code in (0, 1)  # 1: at this size every stage costs more than it saves
    text = capsys.readouterr().out
    assert "Prefill of 36 vision tokens and 10 text tokens, random" in text
    assert text.count("0.0000") == 4
    monkeypatch.setattr(sys, "argv", ["bench", *size, "--layer", "9", "--keep", "9"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts/bench_prefill.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1, "an impossible layer is one line"
