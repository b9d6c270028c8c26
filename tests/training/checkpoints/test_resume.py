"""Interrupted and resumed runs end with the weights of the uninterrupted one, bit for bit."""

import json

import pytest
import torch
from training.helpers import Interrupt, Workplace, callback, weights

KL = ["Label", "KL"]
COPIED = {"teacher": "FrozenCopy", "losses": KL}
ADAPTER_OFF = {"teacher": "AdapterOff", "losses": KL}
GATE = {"pruner": {"type": "learned_gate", "scorer": {"type": "local_global", "width": 8}}, "keep_tokens": 16}
LORA = {"lora": {"r": 4, "lora_dropout": 0.2}, "train": ["projector"]}
RANDOM = {"class_path": "RandomBudget", "init_args": {"low": 0.25, "high": 4}}
TRAINER = {"max_steps": 8}  # an epoch has five batches

RUNS = {
    "pool, full, within the first epoch": (2, "end", {}),
    "pool, full, within the second epoch": (6, "end", {}),
    "pool, full, at the end of an epoch": (4, "end", {}),
    "pool, full, before a batch": (3, "start", {}),
    "pool, full, after a backward pass": (3, "backward", {}),
    "gate, in phase one": (1, "end", {"model": {"plan": GATE, "pruner_phase": {"steps": 4}}}),
    "gate, between the phases": (3, "end", {"model": {"plan": GATE, "pruner_phase": {"steps": 4}}}),
    "gate, in phase two": (5, "end", {"model": {"plan": GATE, "pruner_phase": {"steps": 4}}}),
    "LoRA with dropout, random budgets": (3, "end", {"model": LORA | {"schedule": RANDOM}}),
    "LoRA with dropout, at the end of an epoch": (4, "end", {"model": LORA | {"schedule": RANDOM}}),
    "LoRA and its teacher": (6, "backward", {"model": LORA | ADAPTER_OFF}),
    "a copied teacher": (
        3,
        "end",
        {"model": COPIED | {"train": ["projector", "language_model"]}},
    ),
    "between accumulated batches": (3, "backward", {"trainer": {"accumulate_grad_batches": 2}}),
    "between accumulated batches, at the end of one": (7, "end", {"trainer": {"accumulate_grad_batches": 2}}),
    "text without images, gate": (
        1,
        "end",
        {"model": {"plan": GATE, "pruner_phase": {"steps": 4}}, "data": {"val_fraction": 0.2}},
    ),
}


def flat(value, path=""):
    """Every leaf of nested dicts and lists with its path."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in flat(item, f"{path}/{key}")]
    return [(path, value)]


def _comparable(value):
    """Leaves without the recipe, whose folder, callbacks and `ckpt_path` differ."""
    return [leaf for leaf in flat(value) if not leaf[0].startswith("/recipe")]


@pytest.fixture(scope="module")
def wholes(base_folder, chat_folder, tmp_path_factory):
    """Uninterrupted runs by their settings: the weights, and what their last checkpoint holds."""
    done = {}

    def whole(sections):
        key = json.dumps(sections, sort_keys=True)
        if key not in done:
            work = Workplace(base_folder, chat_folder, tmp_path_factory.mktemp("whole"))
            done[key] = weights(work.fit(**sections)), work.saved()
        return done[key]

    return whole


QUICK = (
    "pool, full, before a batch", "gate, between the phases", "LoRA with dropout, random budgets",
    "between accumulated batches",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in RUNS])
def test_a_resumed_run_ends_as_the_uninterrupted_one(work, wholes, name):
    batch, where, sections = RUNS[name]
    kind = "RuntimeError" if name == "pool, full, before a batch" else "KeyboardInterrupt"
    sections = sections | {"trainer": TRAINER | sections.get("trainer", {})}
    broken = {"callbacks": [callback(Interrupt, batch=batch, where=where, kind=kind)]}
    message = (
        r"^Interrupted; resume with[^\n]*--ckpt_path \S*last.ckpt\.$" if kind == "KeyboardInterrupt" else "broken off"
    )
    with pytest.raises((KeyboardInterrupt, RuntimeError), match=message):
        work.fit(**sections | {"trainer": sections["trainer"] | broken})
    assert 0 < work.saved()["tpcompress"]["step"] < 8
    resumed = work.fit("run", "--ckpt_path", "last", **sections)
    whole, saved = wholes(sections)
    assert resumed.trainer.global_step == 8
    ours = weights(resumed)
    different = [key for key, value in whole.items() if not torch.equal(value, ours[key])]
    assert not different
    states = [saved, work.saved()]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "tpcompress"):
        pairs = list(zip(*(_comparable(state[part]) for state in states), strict=True))
        assert pairs
        for (path, one), (_, other) in pairs:
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, path


def test_an_interruption_within_an_optimizer_step_keeps_the_checkpoint_before(work, wholes):
    settings = {"checkpoints": {"every": 2}}
    broken = {"callbacks": [callback(Interrupt, batch=3, where="step")]}
    with pytest.raises(KeyboardInterrupt, match="resume with"):
        work.fit("resumed", trainer=TRAINER | broken, **settings)
    assert work.saved("resumed")["tpcompress"]["step"] == 2
    whole, _ = wholes({"trainer": TRAINER})
    resumed = work.fit("resumed", "--ckpt_path", str(work.last("resumed")), trainer=TRAINER, **settings)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in whole.items())


def test_an_interruption_before_the_first_step_saves_nothing(work):
    broken = {"callbacks": [callback(Interrupt, batch=0, where="backward")]}
    with pytest.raises(KeyboardInterrupt, match="^Interrupted before the first checkpoint"):
        work.fit(trainer=broken)
    assert not work.last().exists()


def test_a_run_that_fails_to_resume_leaves_its_checkpoint_alone(work):
    work.fit()
    before = work.last().read_bytes()
    with pytest.raises(ValueError, match="batch_size 2 -> 3"):
        work.fit("run", "--ckpt_path", "last", data={"batch_size": 3}, trainer={"max_steps": 9})
    assert work.last().read_bytes() == before


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps(work):
    work.fit()
    longer = work.fit("run", "--ckpt_path", str(work.folder / "run"), trainer={"max_steps": 7})
    assert longer.trainer.global_step == 7
    assert work.saved()["tpcompress"]["step"] == work.saved()["tpcompress"]["steps"] == 7


def test_a_longer_run_does_not_go_back_to_the_pruners_phase(work):
    work.fit(model={"plan": GATE}, trainer={"max_steps": 2})
    with pytest.raises(ValueError, match=r"^In the checkpoint's run the pruner trained alone for 1 steps[^\n]*$"):
        work.fit("run", "--ckpt_path", "last", model={"plan": GATE}, trainer={"max_steps": 6})
    how = {"plan": GATE, "pruner_phase": {"steps": 1}}
    longer = work.fit("run", "--ckpt_path", "last", model=how, trainer={"max_steps": 6})
    assert longer.trainer.global_step == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": {"pruner": "pool", "keep_tokens": 20}}, "The checkpoint was trained with plan {"),
        pytest.param(
            {"train": ["projector"]},
            "The checkpoint was trained with train \\['language_model'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"plan": GATE},
            "The checkpoint lacks [0-9]+ of the [0-9]+ weights that train here, model.token_pruners",
            marks=pytest.mark.slow,
        ),
        ({"lora": {}}, "The checkpoint lacks"),
    ],
)
def test_going_on_with_another_recipe_is_refused(work, changes, message):
    work.fit()
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        work.fit("other", "--ckpt_path", str(work.last()), model=changes, trainer={"max_steps": 5})


def test_a_run_that_ends_within_an_epoch_has_a_last_checkpoint(work):
    run = work.fit(trainer={"max_steps": 7}, checkpoints={"every": 3})
    saved = work.saved()
    assert saved["tpcompress"]["step"] == saved["tpcompress"]["steps"] == saved["global_step"] == 7
    assert run.trainer.current_epoch >= 1
    assert [path.name for path in work.last().parent.iterdir()] == ["last.ckpt"]
    assert (work.folder / "run/recipe.yaml").is_file()


@pytest.mark.parametrize(
    ("model", "absent"),
    [
        pytest.param({"train": ["projector"]}, ["vision_tower", "language_model", "lm_head"], marks=pytest.mark.slow),
        (
            LORA | ADAPTER_OFF,
            ["vision_tower", "base_layer", "original_module", "embed_tokens", "teacher"],
        ),
        (
            COPIED | {"train": ["language_model"]},
            ["vision_tower", "multi_modal_projector", "teacher"],
        ),
        pytest.param(
            {"train": [], "plan": GATE, "pruner_phase": {"steps": 3}},
            ["vision_tower", "language_model", "projector"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_checkpoints_hold_what_trains_and_nothing_else(work, model, absent):
    run = work.fit(model=model)
    names = set(work.saved()["state_dict"])
    trained = {
        f"model.{name}" for name, p in run.model.model.named_parameters() if any(p is t for t in run.model.trainable)
    }
    assert names == trained != set()
    assert not [name for name in names if any(word in name for word in absent)]
    frozen = {f"model.{name}" for name, _ in run.model.model.named_parameters()} - trained
    assert frozen
    moments = work.saved()["optimizer_states"][0]["state"]
    assert len(moments) <= len(trained)


def test_every_must_be_positive(work):
    with pytest.raises(ValueError, match="^checkpoints.every must be at least 1 step, got 0.$"):
        work.fit(checkpoints={"every": 0})
