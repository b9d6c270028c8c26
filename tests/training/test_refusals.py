"""Settings of a run that are refused, each in one line."""

import pytest
import torch
from training.helpers import Interrupt, Poison, callback
from training.module_runs import GATE

from tpcompress.training.module import PruningModule
from tpcompress.training.nan_guard import NonFiniteLoss
from tpcompress.training.phases import PrunerPhase

# ------------------------------------------------------------------------------------------------------ refusals


def test_packed_data_and_pruners_that_read_the_question_exclude_each_other(work):
    plan = {"pruner": {"type": "learned_gate", "scorer": {"type": "local_global", "question": True}}, "keep_tokens": 16}
    with pytest.raises(ValueError, match=r"^Pruner 'learned_gate' reads the prompt, but a packed[^\n]*$"):
        work.fit(model={"plan": plan}, data={"pack": True})
    assert work.fit(model={"plan": plan, "pruner_phase": {"steps": 2}}).trainer.global_step == 3
    assert work.fit(data={"pack": True}).trainer.global_step == 3


def test_packed_data_needs_sdpa(work):
    with pytest.raises(ValueError, match=r"^Packed sequences need attention sdpa, got eager[^\n]*$"):
        work.fit(model={"attention": "eager"}, data={"pack": True})


@pytest.mark.parametrize("steps", [0, 4])
def test_a_learned_pruner_needs_steps_of_its_own(work, steps):
    with pytest.raises(ValueError, match=rf"^The pruner phase has {steps} of 3 steps; set model.pruner_phase.steps"):
        work.fit(model={"plan": GATE, "pruner_phase": {"steps": steps}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ["head"]}, "train: unknown part head; choose of vision_tower, projector, language_model, pruner"),
        ({"train": []}, "Nothing trains: train is empty and there is no lora"),
        ({"train": ["language_model"], "lora": {}}, "train: language_model and lora exclude each other"),
        ({"train": ["pruner"]}, "train: pruner needs a plan with a pruner that has weights"),
        ({"plan": GATE, "full_every": -1}, "full_every is a whole number of at least 0, got -1"),
        ({"losses": []}, "losses is empty; leave it out for the label loss"),
        ({"lora": {"peft_type": "PROMPT_TUNING"}}, "lora: no tuner 'PROMPT_TUNING' whose weights can be merged"),
        ({"quantize": {"load_in_4bit": True}}, "quantize requires bitsandbytes, which is not installed"),
        ({"lora": {"rank": 4}}, "lora: got an unexpected keyword argument 'rank'"),
        ({"lora": {"target_modules": "nowhere"}}, "lora: "),
        ({"plan": {"pruner": "pool", "keep_tokens": 3, "layer": 9}}, "Stage 0 acts at layer 9, but the model has 4"),
        ({"plan": "gone.yaml"}, "No plan at gone.yaml"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_settings_that_cannot_be(work, settings, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        PruningModule(str(work.base), **settings).configure_model()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrunerPhase(steps=-2), "pruner_phase.steps is a whole number of steps or a share below 1, got -2"),
        (lambda: PrunerPhase(steps=2.5), "pruner_phase.steps is a whole number of steps or a share below 1, got 2.5"),
        (lambda: PrunerPhase(full_every=-1), "full_every is a whole number of at least 0"),
    ],
)
def test_groups_of_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_bases_that_cannot_be(work, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^No folder /gone/base;[^\n]*$"):
        PruningModule("/gone/base")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^No processor at '[^\n]*$"):
        PruningModule(str(tmp_path / "empty"))


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_it_spreads(work, what):
    settings = {"checkpoints": {"every": 1}}
    with pytest.raises(NonFiniteLoss, match=r"is not finite at step 2 \([^\n]*the last checkpoint is intact[^\n]*$"):
        work.fit(trainer={"max_steps": 5, "callbacks": [callback(Poison, step=2, what=what)]}, **settings)
    saved = work.saved()
    assert saved["tpcompress"]["step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    with pytest.raises(KeyboardInterrupt):
        work.fit("sound", trainer={"max_steps": 5, "callbacks": [callback(Interrupt, batch=1)]})
    sound = work.saved("sound")["state_dict"]
    assert all(torch.equal(value, sound[name]) for name, value in saved["state_dict"].items())


def test_a_sequence_beyond_the_positions_of_the_model_is_a_bad_row(work, monkeypatch):
    monkeypatch.setattr("tpcompress.training.module.max_positions", lambda base: 100)
    with pytest.raises(ValueError, match=r"too long: \d+ tokens for the 100 positions of the model"):
        work.fit(data={"on_bad_row": "raise"})
