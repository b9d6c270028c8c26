"""Which step trains what, at which length, before which layer, and on how many budgets."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from training.helpers import TOKENS, Watch, callback, found

from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.distributed.ddp import check_ddp
from tpcompress.training.losses.imitate import Imitate
from tpcompress.training.losses.label import Label
from tpcompress.training.module import PruningModule
from tpcompress.training.phases import PrunerPhase, phases_of
from tpcompress.training.steps import step_layers

SCORER = {"type": "local_global", "width": 8}
GATE = {"pruner": {"type": "learned_gate", "scorer": SCORER}, "keep_tokens": 16}
STRAIGHT = {"type": "learned_gate", "scorer": SCORER, "selector": "straight_through"}
FIRST_TWO, FIRST_FOUR = PrunerPhase(steps=2), PrunerPhase(steps=4)
ALTERNATING = PrunerPhase(steps=4, full_every=2)
WATCH = {"callbacks": [callback(Watch)]}


def shape(phases) -> list[tuple]:
    return [(p.start, p.end, p.pruner, p.rest, p.full_every) for p in phases]


@pytest.mark.parametrize(
    ("gate", "train", "rest", "scorer", "full_every", "expected"),
    [
        (None, {"projector"}, True, PrunerPhase(), 0, [(0, 10, False, True, 0)]),
        ("noise", {"projector"}, True, PrunerPhase(), 0, [(0, 5, True, False, 1), (5, 10, False, True, 0)]),
        ("noise", {"projector"}, True, PrunerPhase(steps=0.3), 0, [(0, 3, True, False, 1), (3, 10, False, True, 0)]),
        ("noise", set(), False, PrunerPhase(), 0, [(0, 10, True, False, 1)]),
        ("noise", {"pruner", "projector"}, True, PrunerPhase(), 4, [(0, 10, True, True, 4)]),
        ("noise", {"projector", "pruner"}, True, FIRST_TWO, 1, [(0, 2, True, False, 1), (2, 10, True, True, 1)]),
        ("gather_value", {"projector"}, True, FIRST_FOUR, 0, [(0, 4, True, False, 0), (4, 10, False, True, 0)]),
        ("gather_value", {"projector"}, True, ALTERNATING, 0, [(0, 4, True, False, 2), (4, 10, False, True, 0)]),
    ],
)  # fmt: skip
def test_phases_of_a_run(gate, train, rest, scorer, full_every, expected):
    pruner = "pool" if gate is None else STRAIGHT | {"applier": gate}
    plan = PruningPlan.from_dict({"pruner": pruner, "keep_tokens": 4})
    assert shape(phases_of(plan, 10, train, rest, scorer, (full_every, None, []))) == expected


def test_a_gradient_must_be_able_to_reach_what_trains():
    plan = PruningPlan.from_dict(GATE)
    for alone, main in ((PrunerPhase(full_every=0), 0), (PrunerPhase(steps=3), 0)):
        train = {"projector"} if alone.full_every == 0 else {"pruner", "projector"}
        with pytest.raises(ValueError, match=r"^The pruner trains, but its gates carry a gradient[^\n]*$"):
            phases_of(plan, 10, train, True, alone, (main, None, []))


def test_a_phase_in_which_nothing_trains_is_refused():
    plan = PruningPlan.from_dict(GATE)
    with pytest.raises(ValueError, match=r"^Nothing trains from step 3 of 10 on[^\n]*$"):
        phases_of(plan, 10, set(), False, PrunerPhase(steps=3), (0, None, []))
    assert shape(phases_of(plan, 10, {"pruner"}, False, PrunerPhase(steps=3), (1, None, [])))[-1] == (
        3,
        10,
        True,
        False,
        1,
    )


def test_losses_on_choices_count_only_where_a_pruner_trains():
    plan, gates = PruningPlan.from_dict(GATE), [Label(), Imitate(of="scores")]
    first, second = phases_of(plan, 10, {"projector"}, True, PrunerPhase(), (0, None, gates))
    assert (first.losses, second.losses) == (gates, gates[:1]), "the projector must not be moved to please a guide"
    (joint,) = phases_of(plan, 10, {"projector", "pruner"}, True, PrunerPhase(), (1, None, gates))
    assert joint.losses == gates
    with pytest.raises(ValueError, match=r"^Loss 'imitate' needs a pruner that trains, and from step 5 on[^\n]*$"):
        phases_of(plan, 10, {"projector"}, True, PrunerPhase(), (0, None, gates[1:]))
    assert phases_of(plan, 10, set(), False, PrunerPhase(), (0, None, gates[1:]))[0].losses == gates[1:]


def test_a_pruner_that_no_loss_reaches_is_refused(work):
    gate = GATE | {"pruner": STRAIGHT | {"applier": "gather"}}
    with pytest.raises(ValueError, match=r"^The pruner trains, but no loss depends on its selection[^\n]*$"):
        work.fit(model={"plan": gate})
    with pytest.raises(ValueError, match=r"^The pruner trains, but no loss depends on its selection[^\n]*$"):
        work.fit(model={"plan": gate, "train": ["pruner", "projector"]})
    work.fit(model={"plan": gate, "pruner_phase": {"losses": ["Label", "Imitate"]}})


def test_plain_ddp_is_refused_where_phases_train_different_weights():
    plain = SimpleNamespace(strategy=DDPStrategy())
    looks = SimpleNamespace(strategy=DDPStrategy(find_unused_parameters=True))
    plan = PruningPlan.from_dict(GATE)
    two = phases_of(plan, 10, {"projector"}, True, PrunerPhase(), (0, None, []))
    with pytest.raises(ValueError, match=r"^Strategy ddp waits for gradients[^\n]*$"):
        check_ddp(plain, two)
    check_ddp(plain, two[1:])
    check_ddp(looks, two)
    check_ddp(SimpleNamespace(strategy=DeepSpeedStrategy(stage=2)), two)  # a subclass of DDPStrategy in Lightning


def test_a_phase_without_losses_is_refused(work):
    with pytest.raises(ValueError, match=r"^pruner_phase.losses is empty[^\n]*$"):
        PrunerPhase(losses=[])
    with pytest.raises(ValueError, match=r"^Loss 'sparsity' needs a learned pruner[^\n]*$"):
        work.fit(model={"losses": ["Label", "Sparsity"]})


def test_one_step_in_two_sees_the_full_length(work):
    plan = {"pruner": STRAIGHT | {"applier": "gather_value"}, "keep_tokens": 16}
    how = {"plan": plan, "train": ["pruner", "language_model"], "full_every": 2}
    watch = found(work.fit(trainer=WATCH | {"max_steps": 5}, model=how, diagnostics={"every": 0}), Watch)
    assert watch.modes == ["mask", "drop"] * 2 + ["mask"]
    assert [width > TOKENS for width in watch.widths] == [True, False, True, False, True]
    for names in watch.changed:
        assert any("token_pruners" in name for name in names), "the pruner learns at both lengths"
        assert any("language_model" in name for name in names)
        assert not any("vision_tower" in name for name in names)


def test_several_budgets_in_one_step_average_their_losses(work):
    factors = [9.0, 1.0, 0.25]

    def one_step(name, schedule, **more):
        init = {"class_path": schedule, "init_args": more}
        how = {"schedule": init, "optimizer": {"lr": 0.0}}
        run = work.fit(name, trainer=WATCH | {"max_steps": 1}, model=how, diagnostics={"every": 0})
        return found(run, Watch).widths, float(run.trainer.callback_metrics["loss/label"])

    widths, loss = one_step("three", "Matryoshka", factors=factors)
    singles = [one_step(f"one{factor}", "Matryoshka", factors=[factor]) for factor in factors]
    assert widths == [width for single, _ in singles for width in single]
    assert len(set(widths)) == 3
    assert loss == pytest.approx(sum(value for _, value in singles) / 3, rel=1e-6)


def test_a_layer_ramp_moves_the_stage_and_arrives(work):
    how = {"plan": {"pruner": "pool", "keep_tokens": 16, "layer": 1}, "schedule": {"class_path": "LayerRamp"}}
    run = work.fit(trainer={"max_steps": 4}, model=how)
    module = run.model
    depth = len(module.parts.layers)
    assert [step_layers(module.plan, module.schedule, depth, p) for p in (0.0, 1 / 3, 2 / 3, 1.0)] == [
        [3],
        [3],
        [2],
        [1],
    ]
    two = {
        "stages": [
            {
                "pruner": "uniform",
                "keep_tokens": 30,
                "layer": n,
            }
            for n in (0, 1)
        ]
    }
    module = PruningModule(str(work.base), plan=two, schedule=module.schedule)
    module.configure_model()
    assert step_layers(module.plan, module.schedule, depth, 0.0) == [2, 3], "stages keep their order"


def test_what_a_gate_has_learnt_no_longer_wavers(work):
    """In phase two the pruner stands as in the export, whatever its selector explores in training."""
    plan = {
        "pruner": {"type": "learned_gate", "scorer": SCORER, "selector": "gumbel_topk", "applier": "gather"},
        "keep_tokens": 16,
    }
    run = work.fit(
        trainer={"max_steps": 4},
        model={"plan": plan, "pruner_phase": {"steps": 2, "losses": ["Label", "ScoreFunction"]}},
    )
    assert not run.model.model.token_pruners[0].training
    assert torch.isfinite(run.trainer.callback_metrics["loss/total"])


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "use_dora": True},
        {"peft_type": "IA3", "feedforward_modules": []},
        {"peft_type": "oft", "oft_block_size": 4},
    ],
)
def test_other_tuners(work, fields):
    run = work.fit(trainer=WATCH, model={"lora": fields, "teacher": "AdapterOff", "losses": ["Label", "KL"]})
    changed = set().union(*found(run, Watch).changed)
    assert changed
    assert not any("base_layer" in name for name in changed)
    assert all("language_model" in name for name in changed)


def test_learning_rates_of_the_parts(work):
    optimizer = {"lr": 1e-3, "projector_lr": 2e-3, "vision_tower_lr": 3e-3, "warmup": 1}
    run = work.fit(trainer=WATCH, model={"optimizer": optimizer})
    rates = found(run, Watch).rates[0]
    assert rates["language_model"] == pytest.approx(1e-3)
    assert rates["projector"] == pytest.approx(2e-3)
    assert rates["vision_tower"] == pytest.approx(3e-3)
