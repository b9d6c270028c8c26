"""What is found out about a pruner while it trains, and what raises an alarm."""

import json
import math
from dataclasses import replace

import pytest
import torch
from training.helpers import found, weights

from tpcompress.insertion.attach import attachment_of
from tpcompress.pruners import Pruner, Selection
from tpcompress.pruners.topk import keep_topk
from tpcompress.training.datamodules.chat import ChatData
from tpcompress.training.diagnostics.probe import Findings, random_selection, take_snapshot
from tpcompress.training.passes import run_pass

GATE = {"pruner": {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}, "keep_tokens": 16}
FINE = Findings(
    step=9, accuracy=0.8, loss=1.0, training_accuracy=0.8, training_kl=0.1, random_accuracy=0.5, random_loss=2.0,
    behind_random=-1.0, behind_random_error=0.1, entropy=0.2, overlap_before=0.9, overlap_images=0.4, never_kept=0.3,
)  # fmt: skip


def looks(work, name="run"):
    return json.loads((work.folder / name / "diagnostics.json").read_text())


def probe(run):
    batch = next(iter(run.datamodule.train_dataloader()))
    return [batch]


def test_every_run_with_a_plan_is_looked_at_when_a_phase_ends(work):
    run = work.fit(trainer={"max_steps": 6}, model={"plan": GATE, "pruner_phase": {"steps": 3}}, data={"batch_size": 4})
    seen = looks(work)["looks"]
    assert [one["step"] for one in seen] == [3, 6]
    assert seen[0]["entropy"] > 0, "phase one gates"
    assert seen[1]["entropy"] is None, "phase two does not"
    assert seen[0]["overlap_before"] is None
    assert 0 <= seen[1]["overlap_before"] <= 1
    assert seen[1]["training_kl"] < 1e-6, "what is gathered in training is what is exported"
    assert seen[0]["training_kl"] > 1e-4, "control: noise is not"
    assert run.trainer.callback_metrics["diagnostics/loss"] == pytest.approx(seen[1]["loss"])


def test_looking_changes_nothing(work):
    how = {"plan": GATE, "pruner_phase": {"steps": 3}}
    seen = work.fit("seen", trainer={"max_steps": 6}, model=how, diagnostics={"every": 1})
    blind = work.fit("blind", trainer={"max_steps": 6}, model=how, diagnostics={"every": 0})
    assert len(looks(work, "seen")["looks"]) == 6
    assert not (work.folder / "blind/diagnostics.json").exists()
    assert all(torch.equal(value, weights(blind)[name]) for name, value in weights(seen).items())


@pytest.mark.parametrize("how", [pytest.param({"plan": None}, marks=pytest.mark.slow), {}])
def test_runs_without_anything_to_see(work, how, monkeypatch):
    monkeypatch.setattr(ChatData, "_has_plan", lambda self: False)  # which refuses rows without an image
    work.fit(model=how, data={"train": str(work.chat / "text.json")})
    found = looks(work)["looks"] if how == {} else []
    assert all(one["never_kept"] is None for one in found)


def test_random_choice_is_random_and_goes_away(work):
    run = work.fit(model={"plan": {"pruner": "divprune", "keep_tokens": 16}})
    own = list(attachment_of(run.model.model).pruners)
    with random_selection(run.model.model):
        inside = list(attachment_of(run.model.model).pruners)
        assert [p.name for p in inside] == ["random"]
    assert all(a is b for a, b in zip(own, attachment_of(run.model.model).pruners, strict=True))


class Corner(Pruner):
    """Keeps the first tokens whatever they show."""

    name = "corner"

    def forward(self, tokens, num_keep_B):
        scores_BV = -torch.arange(tokens.valid_BV.shape[1]).expand(tokens.valid_BV.shape).float()
        return Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)


def test_a_pruner_that_looks_at_places_alone_is_noticed(work):
    run = work.fit(model={"plan": {"pruner": "divprune", "keep_tokens": 16}}, data={"batch_size": 4})
    module = run.model
    seen = take_snapshot(module.context, module.phases[-1], probe(run)).findings
    attachment_of(module.model).pruners[0] = Corner()
    blind = take_snapshot(module.context, module.phases[-1], probe(run)).findings
    assert blind.overlap_images == 1.0
    assert blind.never_kept == pytest.approx(1 - 16 / 144)
    assert seen.overlap_images < 0.9
    assert seen.never_kept < blind.never_kept
    assert any("ignores the image" in alarm for alarm in blind.alarms(learned=True))


@pytest.mark.slow
def test_rows_of_one_picture_say_nothing_about_the_image(work):
    run = work.fit(model={"plan": {"pruner": "divprune", "keep_tokens": 16}}, data={"batch_size": 4})
    (batch,), module = probe(run), run.model
    assert not math.isnan(take_snapshot(module.context, module.phases[-1], [batch]).findings.overlap_images), "control"
    batch = {k: v[:1].expand(4, *v.shape[1:]) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    batch.pop("meta")  # it counts the answers of four others
    assert math.isnan(take_snapshot(module.context, module.phases[-1], [batch]).findings.overlap_images)


def test_random_retains_as_many_where_the_pruner_counts_for_itself(work):
    gate = GATE["pruner"] | {"selector": "threshold", "applier": "value"}
    run = work.fit(model={"plan": GATE | {"pruner": gate}, "pruner_phase": {"steps": 1}}, data={"batch_size": 4})
    model, (batch,) = run.model.model.eval(), probe(run)
    with torch.no_grad():
        attachment_of(model).pruners[0].selector.level.sub_(0.5)
    own = run_pass(model, batch)
    with random_selection(model, own.trace):
        random = run_pass(model, batch)
    with random_selection(model):
        budget = run_pass(model, batch)
    assert own.trace.stages[0].vision_out == random.trace.stages[0].vision_out != budget.trace.stages[0].vision_out
    assert not torch.equal(own.trace.stages[0].retained_RV, random.trace.stages[0].retained_RV)


@pytest.mark.slow
def test_hard_gates_have_no_entropy(work):
    gate = GATE["pruner"] | {"selector": "straight_through", "applier": "value"}
    work.fit(model={"plan": GATE | {"pruner": gate}, "pruner_phase": {"steps": 1}})
    assert looks(work)["looks"][0]["entropy"] is None


def test_a_mixed_phase_is_always_looked_at_in_full(work):
    how = {"plan": GATE, "pruner_phase": {"steps": 6, "full_every": 2}}
    work.fit(trainer={"max_steps": 6}, model=how, diagnostics={"every": 1})
    assert all(one["entropy"] > 0 for one in looks(work)["looks"])


def test_what_follows_a_schedule_is_measured_at_its_end(work):
    rules = {"type": "mix", "importance": "novelty", "uniqueness": "last_vision"}
    how = {"mode": "scheduled", "alpha": 0.0, "alpha_end": 1.0}
    for name, more in (("moving", how), ("end", {"alpha": 1.0}), ("start", {"alpha": 0.0})):
        model = {"plan": {"pruner": rules | more, "keep_tokens": 16}, "optimizer": {"lr": 0.0}}
        data = {"val_fraction": 0.5}
        work.fit(name, trainer={"val_check_interval": 1}, model=model, data=data, diagnostics={"every": 1})
    moving, end, start = ([one["loss"] for one in looks(work, name)["looks"]] for name in ("moving", "end", "start"))
    assert moving == end
    assert end[0] != start[0], "control"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"behind_random": 0.3}, "is worse than random"),
        ({"overlap_images": 0.99}, "ignores the image"),
        ({"training_accuracy": 0.95}, "drift apart"),
        ({"accuracy": 0.4}, "drift apart"),
    ],
)
def test_alarms(change, words):
    (alarm,) = replace(FINE, **change).alarms(learned=True)
    assert words in alarm
    assert "\n" not in alarm


def test_what_is_no_alarm():
    assert FINE.alarms(learned=True) == []
    assert replace(FINE, behind_random=0.15).alarms(learned=True) == [], "within two standard errors"
    assert replace(FINE, overlap_images=1.0, behind_random=1.0).alarms(learned=False) == [], "uniform cannot help it"
    assert replace(FINE, overlap_images=math.nan, behind_random=math.nan).alarms(learned=True) == []


def test_alarms_are_said_at_the_end(work, capsys):
    run = work.fit(model={"plan": GATE, "pruner_phase": {"steps": 1}})
    callback = found(run, type("Diagnostics", (), {}))
    callback.alarms = ["the pruner is worse than random"]
    callback.on_train_end(run.trainer, run.model)
    assert "ALARM the pruner is worse than random" in capsys.readouterr().err


def test_a_resumed_run_keeps_the_looks_before(work):
    how = {"model": {"plan": GATE, "pruner_phase": {"steps": 1}}, "diagnostics": {"every": 1}}
    work.fit(trainer={"max_steps": 2}, **how)
    before = looks(work)["looks"]
    work.fit("run", "--ckpt_path", "last", trainer={"max_steps": 4}, **how)
    after = looks(work)["looks"]
    assert [one["step"] for one in after] == [1, 2, 3, 4]
    assert after[: len(before)] == before


@pytest.mark.parametrize("settings", [{"every": -1}, pytest.param({"batches": 0}, marks=pytest.mark.slow)])
def test_impossible_settings(work, settings):
    with pytest.raises(ValueError, match=r"^diagnostics needs every >= 0 and batches >= 1[^\n]*$"):
        work.fit(diagnostics=settings)


COLD = {"type": "learned_gate", "scorer": "linear", "selector": "straight_through", "applier": "gather_value"}


@pytest.mark.parametrize("reproduction", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_estimator_that_does_not_learn_is_warned_of(work, capsys, reproduction):
    plan = {"pruner": COLD, "keep_tokens": 16}
    work.fit(model={"plan": plan, "pruner_phase": {"steps": 1}, "reproduction": reproduction}, trainer={"max_steps": 2})
    said = capsys.readouterr().err
    assert ("straight_through with gather_value, gathered, did not train a scorer" in said) != reproduction
    work.fit("fine", model={"plan": GATE, "pruner_phase": {"steps": 1}}, trainer={"max_steps": 2})
    assert "found not to teach" not in capsys.readouterr().err
