"""Groups and learning rates of the optimizer."""

import pytest
import torch
from support import tiny_model
from torch import nn

from tpcompress.families import resolve
from tpcompress.insertion.attach import attach
from tpcompress.insertion.plan import PruningPlan, Stage
from tpcompress.training.adapters import add_lora
from tpcompress.training.optim import Optimizer, build_optimizer, group_of, warmup_cosine
from tpcompress.training.phases import Phase
from tpcompress.training.schedules import Constant

SETTINGS = Optimizer(lr=1.0, projector_lr=2.0, pruner_lr=3.0, weight_decay=0.1, warmup=4, final=0.1)
PEAK = {"language_model": 1.0, "vision_tower": 1.0, "projector": 2.0, "pruner": 3.0}


@pytest.fixture(params=["full", "lora"])
def optimizer(request):
    model = tiny_model()
    parts = resolve(model)
    if request.param == "lora":
        model.requires_grad_(False)
        model = add_lora(model, {"r": 2}, parts, {"projector"})
    attach(model, PruningPlan([Stage("learned_gate", keep_tokens=8)]))
    return model, build_optimizer(model, parts, SETTINGS), request.param


def test_every_trainable_weight_is_in_one_group_of_its_part(optimizer):
    model, adam, how = optimizer
    where = {id(p): group for group in adam.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in adam.param_groups) == len(where)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in trainable.values()} == set(where)
    seen = set()
    for name, p in trainable.items():
        part = next(
            part
            for part, word in {
                "pruner": "token_pruners",
                "projector": "multi_modal_projector",
                "vision_tower": "vision_tower",
                "language_model": "",
            }.items()
            if word in name
        )
        group = where[id(p)]
        assert group["name"].partition(".")[0] == part
        assert group["initial_lr" if "initial_lr" in group else "lr"] == PEAK[part]
        assert group["weight_decay"] == (0.1 if p.ndim >= 2 and part != "pruner" else 0.0)
        seen.add(part)
    assert seen == ({"pruner", "projector", "language_model"} if how == "lora" else set(PEAK))


def test_nothing_to_train_is_refused():
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="^Nothing trains:"):
        build_optimizer(model, resolve(model), SETTINGS)


def test_names_decide_the_group():
    parts = resolve(tiny_model())
    assert group_of("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight", parts) == (
        "language_model"
    )
    assert group_of("lm_head.weight", parts) == "language_model"
    assert group_of("model.multi_modal_projector.modules_to_save.default.linear_1.weight", parts) == "projector"


def stretches(scorer_steps: int, steps: int) -> list[Phase]:
    """The pruner alone, then the rest."""
    alone = Phase(0, scorer_steps, True, False, 1, Constant(), [])
    return [alone, Phase(scorer_steps, steps, False, True, 0, Constant(), [])]


def rates(scorer_steps: int, steps: int) -> dict[str, list[float]]:
    groups = [{"name": name, "params": [nn.Parameter(torch.zeros(1))], "lr": 2.0} for name in PEAK]
    adam = torch.optim.AdamW(groups)
    scheduler = warmup_cosine(adam, SETTINGS, stretches(scorer_steps, steps))
    seen: dict[str, list[float]] = {name: [] for name in PEAK}
    for _ in range(steps):
        for group in adam.param_groups:
            seen[group["name"]].append(group["lr"])
        adam.step()
        scheduler.step()
    return seen


def test_each_phase_has_its_own_warm_up_and_cosine():
    seen = rates(10, 40)
    assert seen["pruner"][10:] == [0.0] * 30
    for name in ("projector", "vision_tower", "language_model"):
        assert seen[name][:10] == [0.0] * 10
    for values in (seen["pruner"][:10], seen["language_model"][10:]):
        assert all(value > 0 for value in values)
        assert values[0] == pytest.approx(2.0 / 4)
        assert values.index(max(values)) == 3
        assert values[3:] == sorted(values[3:], reverse=True)
    done = 29 / 30
    assert seen["projector"][-1] == pytest.approx(
        2.0 * (0.1 + 0.9 * (1 + torch.cos(torch.tensor(torch.pi * done)).item()) / 2)
    )


def test_without_a_scorer_everything_else_trains_from_the_start():
    seen = rates(0, 8)
    assert seen["pruner"] == [0.0] * 8
    assert seen["language_model"][0] == pytest.approx(0.5)
