"""What single presets say: the schedules, losses and parts of their papers."""

from dataclasses import replace

import pytest
import torch
import yaml
from training.recipe.presets import DEPTH, FILES, LAST, STEPS, V, gate, kept, phases, temperatures

from tpcompress.insertion.plan import Budget
from tpcompress.pruners.gate_components import Scores
from tpcompress.pruners.registry import create_part
from tpcompress.pruners.visionzip import every_nth

# ------------------------------------------------------------------ what some of them say


def test_the_window_of_the_default_reaches_the_plan_and_epics_does_not(read):
    for name, reaches in (("default", True), ("epic_tcd", False)):
        module = read(name).model
        smallest = kept(module, phases(module)[0], 1.0, LAST)[0]
        assert (smallest == module.plan.counts(V)) == reaches


def test_epics_teacher_has_a_tenth_to_three_tenths_more(read):
    for name in ("epic_tcd", "epic_lcd"):
        teacher = read(name).model.teacher
        for step in range(21):
            p = step / 20
            (value,) = teacher.budgets([Budget(keep_ratio=0.5)], p)
            assert value.keep_ratio == pytest.approx(0.5 + min(0.3, 0.1 + 0.5 * p))
        assert teacher.budgets([Budget(keep_ratio=0.9)], 1.0) == [Budget(keep_ratio=1.0)]


def test_epics_distillation_is_at_temperature_two_and_shifted(read):
    for name in ("epic_tcd", "epic_lcd"):
        kl = next(loss for loss in read(name).model.losses if loss.name == "kl")
        assert (kl.temperature, kl.shifted) == (2.0, True)


def test_epics_layer_falls_from_the_last_to_the_second(read):
    module = read("epic_lcd").model
    (phase,) = phases(module)
    assert [phase.schedule.layer(2, DEPTH, p / 4) for p in range(5)] == [31, 24, 17, 10, 2]
    assert phase.schedule.moves
    (phase,) = phases(read("epic_tcd").model)
    assert not phase.schedule.moves, "control"


def test_the_scorer_of_two_stages_meets_every_budget_before_the_rest_meets_one(read):
    module = read("learned_two_stage").model
    first, second = phases(module)
    assert (first.start, first.end, first.full_every, second.full_every) == (0, 1000, 1, 0)
    assert [loss.name for loss in first.losses] == ["label"]
    for progress in (0.0, 1.0):
        assert [kept(module, first, progress, draw) for draw in (0.0, 0.5, LAST)] == [[[32]], [[91]], [[256]]]
    assert kept(module, second, 0.25, 0.0) == [[320]]


def test_the_mix_is_one_step_in_four(read):
    values = yaml.safe_load(FILES["learned_two_stage"].read_text())
    values["model"] |= {"train": ["projector", "pruner"], "full_every": 4}
    first, second = phases(read("learned_two_stage", values).model)
    assert second.pruner
    assert second.rest
    assert [second.full(second.start + step) for step in range(8)] == [True, False, False, False] * 2


def test_the_pyramid(read):
    module = read("pyramiddrop").model
    assert module.plan.counts(V) == [288, 144, 72]
    assert module.plan.layer_average(V, DEPTH) == (8 * 576 + 8 * 288 + 8 * 144 + 8 * 72) / 32


def test_dynamic_llavas_gate(read):
    module = read("dynamic_llava").model
    (phase,) = phases(module)
    assert (phase.pruner, phase.rest, phase.full_every) == (True, True, 1)
    assert temperatures(module) == pytest.approx([1.0, 0.1**0.5, 0.1])
    assert module.plan.layer_average(V, DEPTH) == (2 * 576 + 30 * 115) / 32
    rule, loss = gate(module), module.losses[1]
    assert (rule.scorer.width, loss.below, loss.floor, loss.pooled) == (512, "quadratic", 0.0, False)


def test_vision_selectors_scorer_is_of_the_published_size(read):
    rule = gate(read("visionselector").model)
    scorer = create_part("scorer", rule.scorer.config())
    scorer.build(3584)  # that of Qwen2.5-VL-7B
    assert sum(p.numel() for p in scorer.parameters()) == pytest.approx(12.85e6, rel=1e-3)
    assert temperatures(read("visionselector").model) == pytest.approx([0.5, 0.05**0.5, 0.1])
    (phase,) = phases(read("visionselector").model)
    assert (phase.full_every, phase.rest) == (1, False)


def test_the_noise_gate_learns_alone_at_full_length(read):
    module = read("autoselect_noise").model
    (phase,) = phases(module)
    assert (phase.pruner, phase.rest, phase.full_every, phase.end) == (True, False, 1, STEPS)


def test_matryoshkas_five_counts(read):
    module = read("m3_pool").model
    (phase,) = phases(module)
    for progress in (0.0, 0.5, 1.0):
        assert kept(module, phase, progress, 0.3) == [[576], [144], [36], [9], [1]]


def test_vision_zips_64_are_54_and_10(read):
    module = read("visionzip_projector").model
    rule, (count,) = module.plan.stages[0].pruner, module.plan.counts(V)
    targets = int(count * rule.contextual + 0.5)
    assert (count - targets, targets) == (54, 10)
    rest_BV = torch.arange(V)[None] >= count - targets
    assert every_nth(rest_BV, torch.tensor([targets])).sum() == 10
    assert read("visionzip_projector").trainer.limit_train_batches == 0.1


def test_prumerge_counts_for_itself(read):
    module = read("prumerge_lora").model
    rule = module.plan.stages[0].pruner
    assert (rule.adaptive, rule.plus, rule.neighbours, rule.exact_count) == (True, True, 32, False)
    assert (module.lora["r"], module.lora["lora_alpha"]) == (128, 256)


def test_the_twig_is_as_large_as_three_layers_and_its_budget_an_average(read):
    module = read("twig").model
    (phase,) = phases(module)
    assert (phase.pruner, phase.rest, phase.full_every) == (True, False, 0)
    for tokens, average in ((41, 64), (227, 192)):
        assert round((2 * V + (24 - 2) * tokens) / DEPTH) == average
    with torch.device("meta"):
        scorer = create_part("scorer", gate(module).scorer.config())
        scorer.make(4096)
    llama = 4 * 4096**2 + 3 * 4096 * 11008
    assert sum(p.numel() for p in scorer.parameters()) == pytest.approx(3 * llama, rel=0.1)


def test_light_vlas_noise_dies_out(read):
    module = read("lightvla").model
    rule, (phase,) = gate(module), phases(module)
    assert (phase.full_every, phase.pruner, phase.rest) == (1, True, True)
    assert (rule.selector.noise, rule.selector.cap, rule.scorer.width) == ("uniform", 1.0, None)
    torch.manual_seed(0)
    close = Scores(torch.zeros(1, 12), votes_BVV=0.01 * torch.randn(1, 12, 12))
    clear = replace(close, votes_BVV=2 * torch.eye(12)[None].roll(1, 2))
    valid, count = torch.ones(1, 12, dtype=torch.bool), torch.tensor([12])
    same = {}
    for progress in (0.0, 1.0):
        rule.selector.set_progress(progress)
        for name, scores in (("close", close), ("clear", clear)):
            loud, quiet = (rule.selector(scores, valid, count, explore).keep_BV for explore in (True, False))
            same[name, progress] = torch.equal(loud, quiet)
    # Uniform in [0, 1) moves votes that are less than 1 apart, at first, and none in the end.
    assert same == {("close", 0.0): False, ("clear", 0.0): True, ("close", 1.0): True, ("clear", 1.0): True}
