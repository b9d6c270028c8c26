"""Runs of a few steps: what trains, on how many tokens, against which teacher, and what stops it."""

import io
import json

import pytest
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from support import gradients
from training.helpers import TOKENS, Watch, found, weights
from training.module_runs import GATE, LORA, TAUGHT, WATCH, batch_of, changed, of

from tpcompress.insertion.attach import attach, mode
from tpcompress.insertion.plan import PruningPlan
from tpcompress.training.checkpoints.callback import StepProgress
from tpcompress.training.recipe.run import RecipeCLI, run_recipe


@pytest.mark.parametrize(
    "train",
    [
        ["projector"],
        pytest.param(["vision_tower"], marks=pytest.mark.slow),
        pytest.param(["language_model"], marks=pytest.mark.slow),
        pytest.param(["projector", "language_model"], marks=pytest.mark.slow),
        "full",
    ],
)
def test_only_what_should_train_changes(work, train):
    run = work.fit(model={"train": train})
    wanted = ["vision_tower", "projector", "language_model"] if train == "full" else train
    names = changed(run)
    assert names
    assert names == set().union(*(of(part, names) for part in wanted))
    for part in wanted:
        alive = of(part, weights(run))
        # The last layer of the tower and its last norm feed nothing in LLaVA.
        assert len(of(part, names)) >= 0.5 * len(alive)
    assert run.model.model.training


def test_lora_trains_adapters_and_whole_parts(work):
    run = work.fit(model={"train": ["projector"], "lora": LORA | {"use_rslora": True}})
    names = changed(run)
    assert {n for n in names if "lora_" not in n} == {n for n in names if "modules_to_save" in n}
    assert all("projector" in n for n in names if "modules_to_save" in n)
    assert any("lora_B" in n for n in names)
    assert all("language_model" in n for n in names if "lora_" in n)
    config = run.model.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.1, True)
    assert run.model.model.training


def test_a_learned_pruner_trains_first_alone_and_then_not_at_all(work):
    run = work.fit(
        trainer=WATCH | {"max_steps": 6}, model={"plan": GATE, "pruner_phase": {"steps": 3}}, data={"batch_size": 4}
    )
    watch = found(run, Watch)
    assert watch.steps == list(range(6))
    assert watch.modes == ["mask"] * 3 + ["drop"] * 3
    full = max(watch.widths)
    assert all(width > TOKENS for width in watch.widths[:3])
    assert all(width < 100 for width in watch.widths[3:])
    assert all(names == of("pruner", names) for names in watch.graded[:3])
    assert not any(of("pruner", names) for names in watch.graded[3:])
    for names in watch.changed[:3]:
        assert names == of("pruner", names) != set()
    for names in watch.changed[3:]:
        assert not of("pruner", names)
        assert of("projector", names)
        assert of("language_model", names)
        assert of("vision_tower", names)
    assert full > TOKENS
    for number, rates in enumerate(watch.rates):
        assert (rates["pruner.no_decay"] > 0) == (number < 3)
        assert all((rate > 0) == (number >= 3) for name, rate in rates.items() if "pruner" not in name)


def test_half_of_the_run_is_the_scorers_unless_said_otherwise(work):
    run = work.fit(trainer=WATCH | {"max_steps": 4}, model={"plan": GATE})
    assert found(run, Watch).modes == ["mask", "mask", "drop", "drop"]


def test_a_plan_without_weights_has_one_phase_on_short_sequences(work):
    run = work.fit(trainer=WATCH, model={"plan": {"pruner": "pool", "keep_tokens": 9}})
    watch = found(run, Watch)
    assert watch.modes == ["drop"] * 3
    assert all(width < 80 for width in watch.widths)
    dense = work.fit("dense", trainer=WATCH, model={"plan": None})
    assert all(width > TOKENS for width in found(dense, Watch).widths)


def test_budgets_follow_the_schedule(work):
    schedule = {"class_path": "Linear", "init_args": {"start": 4, "until": 1.0}}
    settings = {"trainer": WATCH | {"max_steps": 4}, "data": {"batch_size": 1, "train": str(work.chat / "images.json")}}
    (work.chat / "images.json").write_text(
        json.dumps([row for row in json.loads((work.chat / "chat.json").read_text()) if "image" in row])
    )
    run = work.fit(model={"schedule": schedule}, **settings)
    dense = work.fit("dense", model={"plan": None}, **settings)
    pairs = zip(found(dense, Watch).widths, found(run, Watch).widths, strict=True)
    assert [TOKENS - (full - short) for full, short in pairs] == [64, 48, 32, 16]


def test_random_budgets_are_drawn_anew_and_again_the_same(work):
    random = {"class_path": "RandomBudget", "init_args": {"low": 0.25, "high": 4}}
    settings = {"trainer": WATCH | {"max_steps": 5, "accumulate_grad_batches": 2}, "model": {"schedule": random}}
    first, again = work.fit("a", **settings), work.fit("b", **settings)
    other = work.fit("c", **settings, seed_everything=5)
    assert len(set(found(first, Watch).widths)) > 5
    assert found(first, Watch).widths == found(again, Watch).widths != found(other, Watch).widths
    assert all(torch.equal(p, weights(again)[n]) for n, p in weights(first).items())
    assert any(not torch.equal(p, weights(other)[n]) for n, p in weights(first).items())


def test_the_seed_of_the_recipe_reaches_the_data(work):
    run = work.fit(seed_everything=11)
    assert run.model.seed == run.datamodule.seed == 11


# ---------------------------------------------------------------------------------------------------- teachers


@pytest.mark.parametrize(
    "how", [{"teacher": "AdapterOff", "lora": LORA, "train": ["projector"]}, {"teacher": "FrozenCopy"}]
)
def test_a_teacher_is_neither_trained_nor_saved(work, how):
    run = work.fit(model=how | {"losses": ["Label", "KL"]})
    assert run.trainer.callback_metrics["loss/kl"] > 0
    assert not any("teacher" in name for name in work.saved()["state_dict"])
    assert not any("teacher" in name for name, _ in run.model.named_parameters())


def test_distillation_pulls_towards_the_teacher(work):
    losses = ["Label", {"class_path": "KL", "init_args": {"weight": 20.0}}]
    how = {"teacher": "FrozenCopy", "losses": losses, "train": ["language_model"]}
    later = work.fit(trainer={"max_steps": 12}, model=how).trainer.callback_metrics["loss/kl"]
    assert later < 0.7 * work.fit("one", trainer={"max_steps": 1}, model=how).trainer.callback_metrics["loss/kl"]


def test_a_loss_without_its_teacher_is_refused(work):
    with pytest.raises(ValueError, match=r"^Loss 'kl' needs a teacher; set model.teacher[^\n]*$"):
        work.fit(model={"losses": ["KL"]})


def test_a_teacher_whom_no_loss_imitates_is_refused(work):
    with pytest.raises(ValueError, match=r"^Teacher 'FrozenCopy' is unused[^\n]*$"):
        work.fit(model={"teacher": "FrozenCopy"})


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"train": ["projector"]},
        {"plan": GATE},
        {"lora": LORA, "train": ["projector"], **TAUGHT},
    ],
)
def test_batches_without_any_image_train_as_text(work, model):
    rows = json.loads((work.chat / "text.json").read_text())  # a run with a plan needs an image in some row
    rows[0] = json.loads((work.chat / "chat.json").read_text())[0]
    path = work.folder / "rows.json"
    path.write_text(json.dumps(rows))
    data = {"train": str(path), "image_folder": str(work.chat / "images")}
    run = work.fit(trainer=WATCH | {"max_steps": 5}, model=model, data=data)
    assert run.trainer.global_step == 5
    assert sum(width < 60 for width in found(run, Watch).widths) >= 4
    if model == {}:
        assert of("language_model", changed(run))


def test_the_scorers_phase_has_losses_of_its_own(work):
    imitate = {"class_path": "Imitate", "init_args": {"weight": {"start": 5.0, "end": 5.0}}}
    scorer = {"steps": 10, "losses": ["Label", imitate, "OnBudget"]}
    metrics = work.fit(trainer={"max_steps": 12}, model={"plan": GATE, "pruner_phase": scorer}).trainer.callback_metrics
    assert metrics["loss/budget"] < 1e-6  # this gate is exact
    first = work.fit("one", trainer={"max_steps": 2}, model={"plan": GATE, "pruner_phase": scorer | {"steps": 1}})
    assert metrics["loss/imitate"] < first.trainer.callback_metrics["loss/imitate"]
    assert metrics["loss/label"] > 0


def test_the_scorer_learns_which_tokens_matter(work):
    """Through the gate alone: the loss falls although nothing but the scorer moves."""
    run = work.fit(trainer={"max_steps": 2}, model={"plan": GATE, "pruner_phase": {"steps": 1}}, data={"batch_size": 4})
    module = run.model
    pruner = module.model.token_pruners[0].train()
    batch = batch_of(run)
    with mode(module.model, "mask"):
        torch.manual_seed(0)
        module.model(**batch).loss.backward()
    found_in = {n.partition(".")[0] for n, p in pruner.named_parameters() if p.grad is not None and p.grad.any()}
    assert found_in == {"scorer"}
    gradients(module.model)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"plan": {"pruner": "pool", "keep_tokens": 16}}, marks=pytest.mark.slow),
        {"plan": GATE},
        {
            "plan": {"pruner": "dart", "layer": 2, "keep_tokens": 16},
            "lora": {"r": 4},
            "train": ["projector"],
            **TAUGHT,
        },
    ],
)
def test_gradient_checkpointing_changes_nothing(work, model):
    plain = work.fit("plain", model=model)
    saving = work.fit("saving", model=model | {"gradient_checkpointing": True})
    assert saving.model.parts.layers[0].gradient_checkpointing
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], value, rtol=0, atol=0, msg=name)


def test_mixed_precision_keeps_what_trains_in_full_precision(work):
    run = work.fit(
        trainer={"precision": "bf16-mixed"},
        model={"dtype": "bfloat16", "lora": LORA, "train": ["projector"], **TAUGHT},
    )
    kinds = {p.requires_grad: set() for p in run.model.model.parameters()}
    for p in run.model.model.parameters():
        kinds[p.requires_grad].add(p.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}


def test_accumulation_counts_optimizer_steps(work):
    run = work.fit(trainer=WATCH | {"accumulate_grad_batches": 3, "max_steps": 2}, model={"plan": GATE})
    watch = found(run, Watch)
    assert watch.steps == [0, 0, 0, 1, 1]  # an epoch has five batches, and its last one steps
    assert watch.modes == ["mask"] * 3 + ["drop"] * 2
    assert [bool(names) for names in watch.changed] == [False, False, True, False, True]


def test_validation_prunes_as_after_export(work):
    run = work.fit(data={"val_fraction": 0.2}, model={"plan": GATE}, trainer={"max_epochs": 1, "max_steps": -1})
    trained = run.model.model
    assert trained.training
    batch = next(iter(run.datamodule.val_dataloader()))
    batch.pop("meta")
    with torch.no_grad():
        loss = trained.eval()(**batch).loss
    assert float(loss) == pytest.approx(float(run.trainer.callback_metrics["val/loss"]), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- loggers


def test_loggers_of_the_recipe_write_files(work):
    folder = str(work.folder / "logs")
    loggers = [
        {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": folder}},
        {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": folder, "name": "tb"}},
    ]
    work.fit(trainer={"logger": loggers, "log_every_n_steps": 1})
    table = next((work.folder / "logs").rglob("metrics.csv")).read_text().splitlines()
    assert {"loss/label", "loss/total", "vision_tokens"} <= set(table[0].split(","))
    assert len(table) == 4
    assert any(path.stat().st_size > 0 for path in (work.folder / "logs/tb").rglob("events.*"))
    recipe = (work.folder / "run/recipe.yaml").read_text()
    assert "CSVLogger" in recipe
    assert "keep_tokens: 16" in recipe


def test_the_attached_plan_is_the_recipes(work):
    run = work.fit()
    plan = PruningPlan.from_dict({"pruner": "pool", "keep_tokens": 16})
    assert run.model.plan.to_dict() == plan.to_dict()
    with pytest.raises(ValueError, match="already carries a plan"):
        attach(run.model.model, plan)


def test_the_recipe_beside_the_checkpoint_runs_again(work):
    run = work.fit(model={"lora": LORA, **TAUGHT, "schedule": {"class_path": "Cosine"}}, seed_everything=4)
    again = run_recipe(
        ["fit", "--config", str(work.folder / "run/recipe.yaml"), "--trainer.default_root_dir", str(work.folder / "b")],
        progress=False,
    )
    assert again.model.seed == 4
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(run).items())


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(work):
    for terminal in (True, False):
        text = io.StringIO()
        progress = StepProgress(Console(file=text, force_terminal=terminal, width=100))
        cli = RecipeCLI(["--config", str(work.recipe(data={"val_fraction": 0.2}))], progress=False, run=False)
        trainer = Trainer(
            max_steps=4, val_check_interval=4, check_val_every_n_epoch=None, log_every_n_steps=2, callbacks=[progress],
            accelerator="cpu", logger=False, default_root_dir=str(work.folder), enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(cli.model, cli.datamodule)
        printed = text.getvalue()
        assert (
            ("4/4" in printed and "━" in printed)
            if terminal
            else [line.partition(" ·")[0] for line in printed.splitlines()] == ["step 2/4", "step 4/4", "step 4"]
        )
        assert "validation loss" in printed
        assert "16 vision tokens" in printed
