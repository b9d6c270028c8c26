"""Teachers say what they promise, about the same answers, and leave the model as they found it."""

import copy
from contextlib import ExitStack
from types import SimpleNamespace

import jsonargparse
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import answer_labels, batch, tiny_model

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach, attachment_of, budgets, layers, mode, record
from tpcompress.insertion.plan import Budget, PruningPlan, Stage
from tpcompress.training.context import StepContext
from tpcompress.training.losses import Ramp
from tpcompress.training.passes import run_pass
from tpcompress.training.teachers import Teacher, list_teachers
from tpcompress.training.teachers.adapter_off import AdapterOff
from tpcompress.training.teachers.base import check_answers
from tpcompress.training.teachers.frozen_copy import FrozenCopy
from tpcompress.training.teachers.larger_budget import LargerBudget

SAMPLES = [(3, 2, 6), (1, 1, 9), (12, 0, 5)]


def make_batch(samples=SAMPLES):
    inputs = batch(samples)
    return inputs | {"labels": answer_labels(inputs), "meta": SimpleNamespace(num_answers=4 * len(samples))}


def make_module(teacher, plan, lora=False):
    """The context of a step; LoRA and projector are well away from the base."""
    base = tiny_model().requires_grad_(False)
    parts = resolve(base)
    teacher.prepare(base, parts, plan, {"r": 2} if lora else None)
    if lora:
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"])
        base = get_peft_model(base, config)
    if plan is not None:
        attach(base, plan)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in base.named_parameters():
        if "lora_" in name or "modules_to_save" in name or not lora:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return StepContext(base.train(), parts, plan, 0, torch.device("cpu"))


def plan_of(*stages):
    return PruningPlan([Stage(*stage[:2], **stage[2]) for stage in stages])


TWO = plan_of(("dart", 2, {"keep_ratio": 0.5}), ("random", 3, {"keep_ratio": 0.125}))


def student(module, inputs, values=None, own=False):
    with torch.no_grad():
        return run_pass(module.model, inputs, values, own)


def cases():
    """Every teacher that computes, with a module that it can teach."""
    yield "AdapterOff", AdapterOff(), TWO, True
    yield "AdapterOff without a plan", AdapterOff(), None, True
    yield "FrozenCopy", FrozenCopy(), TWO, False
    yield "LargerBudget", LargerBudget(2.0), TWO, False
    yield "LargerBudget beside LoRA", LargerBudget(1.0, gap=0.25, nested=False), TWO, True
    known = {"AdapterOff", "FrozenCopy", "LargerBudget", "Cached"}  # the last computes nothing
    for name, cls in list_teachers().items():
        if name not in known:
            file = cls.__module__.rpartition(".")[2]
            yield from ((f"{name} of {file}", cls(**each), TWO, True) for each in cls.test_arguments)


EACH = pytest.mark.parametrize(("teacher", "plan", "lora"), [c[1:] for c in cases()], ids=[c[0] for c in cases()])


# ------------------------------------------------------------------ what every teacher promises


def state_of(model, plan):
    parts = [(part.training, [p.requires_grad for p in part.parameters(recurse=False)]) for part in model.modules()]
    adapters = [part.disable_adapters for part in model.modules() if hasattr(part, "disable_adapters")]
    if plan is None:
        return parts, adapters
    settings = attachment_of(model).settings
    return parts, adapters, settings.mode, settings.budgets, settings.layers, settings.retained


@EACH
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(teacher, plan, lora, fails):
    module, inputs = make_module(teacher, plan, lora), make_batch()
    here, model = student(module, inputs), module.model
    # A run freezes some parts, and some are in eval mode although the rest trains.
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 == 0)
    for number, part in enumerate(model.modules()):
        part.training = number % 2 == 0
    with ExitStack() as stack:
        if plan is not None:
            stack.enter_context(mode(model, "mask"))
            stack.enter_context(budgets(model, [Budget(keep_ratio=0.25)] * 2))
            stack.enter_context(layers(model, [3, 4]))
        before = state_of(model, plan)
        if fails:
            with pytest.raises(ValueError, match="without labels"):
                teacher(module, {k: v for k, v in inputs.items() if k != "labels"}, here, 0.5)
        else:
            taught = teacher(module, inputs, here, 0.5)
            assert not taught.logits_AC.requires_grad
            assert torch.equal(taught.targets_A, here.targets_A)
            assert torch.equal(taught.sample_A, here.sample_A)
        assert state_of(model, plan) == before
        assert torch.is_grad_enabled()


@EACH
def test_the_logits_at_the_answers_come_along_if_the_student_has_them(teacher, plan, lora):
    module, inputs = make_module(teacher, plan, lora), make_batch()
    here = student(module, inputs, own=True)
    own, plain = teacher(module, inputs, here, 0.5), teacher(module, inputs, student(module, inputs), 0.5)
    assert plain.own_AC is None
    torch.testing.assert_close(own.logits_AC, plain.logits_AC)
    # What an answer token's own position predicts is the next token: the same logits, one further.
    torch.testing.assert_close(own.own_AC[:3], own.logits_AC[1:4])
    assert (own.own_AC[3] - own.logits_AC[4]).abs().max() > 1e-3


@EACH
def test_a_batch_of_text_is_taught_as_well(teacher, plan, lora):
    module, inputs = make_module(teacher, plan, lora), make_batch([(3, 0, 6), (9, 0, 4)])
    taught = teacher(module, inputs, student(module, inputs), 0.5)
    assert taught.logits_AC.shape[0] == 8


def test_recipes_name_teachers_by_class():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=Teacher)
    for name, cls in list_teachers().items():
        config = {"teacher": {"class_path": name, "init_args": dict(cls.test_arguments[0])}}
        assert type(parser.instantiate(parser.parse_object(config)).teacher) is cls
    gap = {"start": 0.1, "end": 0.3, "until": 0.4}
    config = {"teacher": {"class_path": "LargerBudget", "init_args": {"factor": 1.0, "gap": gap}}}
    assert parser.instantiate(parser.parse_object(config)).teacher.gap == Ramp(**gap)
    assert {"AdapterOff", "Cached", "FrozenCopy", "LargerBudget"} <= set(list_teachers())


def test_unequal_answers_are_refused():
    here = SimpleNamespace(targets_A=torch.zeros(2))
    check_answers(here, 2)
    with pytest.raises(ValueError, match=r"^Teacher and student predict 1 and 2 answer tokens;[^\n]*$"):
        check_answers(here, 1)


# ------------------------------------------------------------------ the base as teacher


@pytest.mark.parametrize(
    ("teacher", "lora"), [(AdapterOff(), True), (FrozenCopy(), False)], ids=["AdapterOff", "FrozenCopy"]
)
def test_the_teacher_is_the_base(teacher, lora):
    module, inputs = make_module(teacher, TWO, lora), make_batch()
    here = student(module, inputs)
    taught = teacher(module, inputs, here, 0.5)
    expected = run_pass(tiny_model(), inputs)
    torch.testing.assert_close(taught.logits_AC, expected.logits_AC)
    torch.testing.assert_close(taught.hidden_AD, expected.hidden_AD)
    with mode(module.model, "off"):
        trained = student(module, inputs)
    assert (trained.logits_AC - taught.logits_AC).abs().max() > 0.1  # the weights are others now


def test_a_copy_is_moved_once_and_nobody_finds_it(monkeypatch):
    teacher = FrozenCopy()
    module, inputs = make_module(teacher, TWO), make_batch()
    here, moves = student(module, inputs), []
    inner = type(teacher.model).to
    monkeypatch.setattr(type(teacher.model), "to", lambda self, *a: moves.append(a) or inner(self, *a))
    for _ in range(3):
        teacher(module, inputs, here, 0.0)
    assert moves == [(torch.device("cpu"),)]
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not isinstance(teacher, torch.nn.Module)


def test_adapter_off_needs_adapters():
    with pytest.raises(ValueError, match=r"^Teacher AdapterOff needs lora;[^\n]*$"):
        make_module(AdapterOff(), None)


# ------------------------------------------------------------------ the model on more tokens


def test_a_milder_teacher_with_all_tokens_is_the_dense_model():
    module, inputs = make_module(LargerBudget(64.0), TWO), make_batch()
    here = student(module, inputs)
    with mode(module.model.eval(), "off"):
        dense = student(module, inputs)
    taught = LargerBudget(64.0)(module, inputs, here, 0.5)
    torch.testing.assert_close(taught.logits_AC, dense.logits_AC)
    less = LargerBudget(1.5)(module, inputs, here, 0.5)
    assert (less.logits_AC - dense.logits_AC).abs().max() > 1e-2


@pytest.mark.parametrize("pruner", [{"type": "random", "resample": True}, "dart", "divprune"], ids=str)
def test_the_teachers_choice_contains_the_students(pruner):
    plan = plan_of((pruner, 2, {"keep_ratio": 0.25}), ("uniform", 4, {"keep_ratio": 0.125}))
    module, inputs = make_module(LargerBudget(2.0), plan), make_batch()
    module.model.eval()
    torch.manual_seed(1)
    here = student(module, inputs)
    outside = {}
    for nested in (True, False):
        torch.manual_seed(2)
        taught = LargerBudget(2.0, nested=nested)(module, inputs, here, 0.5)
        pairs = list(zip(here.trace.stages, taught.trace.stages, strict=True))
        assert [new.vision_out for _, new in pairs] == [[32, 32, 32], [16, 16, 16]]
        assert [old.vision_out for old, _ in pairs] == [[16, 16, 16], [8, 8, 8]]
        outside[nested] = sum(int((old.retained_RV & ~new.retained_RV).sum()) for old, new in pairs)
    assert outside[True] == 0
    assert outside[False] > 0


def test_a_milder_teacher_acts_at_the_layers_of_its_student():
    module, inputs = make_module(LargerBudget(2.0), TWO), make_batch()
    with layers(module.model, [3, 5]):
        here = student(module, inputs)
    taught = LargerBudget(2.0)(module, inputs, here, 0.5)
    assert [stage.layer for stage in taught.trace.stages] == [3, 5]


def test_a_student_behind_gates_is_taught_by_truly_fewer_tokens():
    plan = plan_of(("learned_gate", 2, {"keep_ratio": 0.25}))
    module, inputs = make_module(LargerBudget(2.0), plan), make_batch()
    with mode(module.model, "mask"):
        here = student(module, inputs)
        taught = LargerBudget(2.0)(module, inputs, here, 0.5)
    assert here.trace.stages[0].selection.gate_BV is not None
    assert here.trace.stages[0].vision_out == [64, 64, 64]
    assert taught.trace.stages[0].vision_out == [32, 32, 32]


def test_budgets_of_a_milder_teacher():
    epic = LargerBudget(1.0, gap=Ramp(0.1, 0.3, until=0.4))
    for progress in (0.0, 0.2, 0.4, 1.0):
        (budget,) = epic.budgets([Budget(keep_ratio=0.25)], progress)
        assert budget.keep_ratio == pytest.approx(0.25 + min(0.3, 0.1 + 0.5 * progress))
    assert epic.budgets([Budget(keep_ratio=0.9)], 1.0) == [Budget(keep_ratio=1.0)]
    counted = LargerBudget(Ramp(4.0, 1.5)).budgets([Budget(keep_tokens=64), Budget(keep_tokens=0)], 1.0)
    assert counted == [Budget(keep_tokens=96), Budget(keep_tokens=0)]


@pytest.mark.parametrize(
    ("teacher", "plan", "message"),
    [
        (LargerBudget(), None, "Teacher LargerBudget needs a plan"),
        (LargerBudget(gap=0.2), plan_of(("uniform", 0, {"keep_tokens": 8})), "Teacher LargerBudget has a gap"),
        (LargerBudget(), plan_of(("tome", 0, {"keep_tokens": 8})), "Pruner 'tome' .*; set nested: false"),
    ],
)
def test_what_a_milder_teacher_cannot_teach(teacher, plan, message):
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        make_module(teacher, plan)


@pytest.mark.parametrize("arguments", [{"factor": 0.5}, {"factor": 1.0}, {"gap": -0.1}, {"factor": Ramp(2.0, 0.9)}])
def test_a_teacher_that_is_no_milder_is_refused(arguments):
    with pytest.raises(ValueError, match=r"^Teacher LargerBudget needs factor >= 1 and gap >= 0, [^\n]*$"):
        LargerBudget(**arguments)


def test_a_merging_pruner_is_taught_without_nesting():
    plan = plan_of(("tome", 0, {"keep_tokens": 8}))
    teacher = LargerBudget(2.0, nested=False)
    module, inputs = make_module(teacher, plan), make_batch()
    with record(module.model) as trace:
        teacher(module, inputs, student(module, inputs), 0.5)
    assert trace.stages[-1].vision_out == [16, 16, 16]
    assert copy.deepcopy(teacher).nested is False
