import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench.models import Shape
from bench.prefill import Ratio, flops, peak_bytes
from bench.training import ANSWER, Work, make_arms, measure

ROOT = Path(__file__).resolve().parents[2]
TOY = Shape(layers=3, width=64, heads=4, mlp=96, vocab=100, side=6, text=40)
KEEP = 4


def arms(adapt: str = "lora", keeps=(KEEP,), pruner="uniform", **more):
    return {(arm.name, arm.keep): arm.step for arm in make_arms(Work(adapt, TOY, **more), keeps, pruner)}


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_masked_and_gathered_steps_compute_the_same_loss_and_the_dense_one_another(adapt):
    made = arms(adapt)
    # One optimizer: a step moves the weights of all, so each starts from the same ones.
    state = [p.detach().clone() for p in made["dense", None].model.parameters()]
    losses = {}
    for key, step in made.items():
        with torch.no_grad():
            for parameter, value in zip(step.model.parameters(), state, strict=False):
                parameter.copy_(value)
        losses[key[0]] = step().item()
    assert losses["masked"] == pytest.approx(losses["gathered"], abs=1e-5)
    assert abs(losses["dense"] - losses["gathered"]) > 1e-4


@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_a_step_trains_what_it_says(adapt):
    model = arms(adapt)["gathered", KEEP].model
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names
    assert all("lora_" in name for name in names) == (adapt == "lora")
    assert not any("vision_tower" in name for name in names)


def test_the_arms_share_weights_and_every_step_moves_them():
    made = arms("full")
    watched = {key: step.model.get_output_embeddings().weight for key, step in made.items()}
    assert len({weight.data_ptr() for weight in watched.values()}) == 1
    for step in made.values():
        before = watched["dense", None].detach().clone()
        step()
        assert not torch.equal(before, watched["dense", None])


def test_gathering_saves_matrix_products_and_memory_and_hiding_does_not():
    made = arms("lora", keeps=(9, KEEP))
    work = {key: flops(step) for key, step in made.items()}
    memory = {key: peak_bytes(step, "cpu") for key, step in made.items()}
    assert work["masked", KEEP] == work["masked", 9] == work["dense", None]
    assert work["gathered", KEEP] < work["gathered", 9] < work["dense", None]
    # 36 + 40 columns against 4 + 40: products grow at least in proportion to columns.
    assert work["gathered", KEEP] / work["dense", None] < (KEEP + TOY.text) / (TOY.side**2 + TOY.text)
    assert memory["gathered", KEEP] < memory["gathered", 9] < memory["dense", None] <= memory["masked", 9]


@pytest.mark.slow
def test_checkpointing_recomputes():
    plain, again = arms(), arms(checkpointing=True)
    for key in plain:
        assert flops(again[key]) > flops(plain[key])
        assert peak_bytes(again[key], "cpu") < peak_bytes(plain[key], "cpu")


def test_only_answers_are_learned():
    batch = arms()["dense", None].batch
    assert (batch["labels"] != -100).sum(1).tolist() == [ANSWER, ANSWER]
    assert batch["labels"].shape == (2, TOY.side**2 + TOY.text)


@pytest.mark.slow
def test_rows_are_measured_against_the_dense_step():
    work = Work("lora", TOY)
    rows = measure(work, make_arms(work, (9, KEEP)), 2, "cpu")
    assert [(row.arm.name, row.arm.keep) for row in rows] == [
        ("dense", None), ("masked", 9), ("gathered", 9), ("masked", KEEP), ("gathered", KEEP)
    ]  # fmt: skip
    assert (rows[0].ratio.median, rows[0].ratio.low, rows[0].ratio.high) == (1.0, 1.0, 1.0)
    assert rows[0].tokens_per_second == pytest.approx(work.tokens / rows[0].seconds)
    assert all(row.flops > 0 and row.peak > 0 for row in rows)


@pytest.mark.parametrize(
    ("name", "keep", "low", "ok"),
    [
        ("gathered", 4, 0.46, False), ("gathered", 4, 0.44, True), ("gathered", 9, 0.9, True),
        ("masked", 4, 0.9, True), ("dense", None, 1.0, True),
    ],
)  # fmt: skip
def test_only_a_gathered_step_at_a_ninth_can_fail(name, keep, low, ok):
    from bench.training import Measured

    row = SimpleNamespace(arm=SimpleNamespace(name=name, keep=keep), ratio=Ratio(low, low, 1.1), vision_tokens=36)
    assert Measured.ok.fget(row) == ok


def test_what_cannot_be():
    with pytest.raises(ValueError, match="one of lora, full, got 'all'"):
        Work("all", TOY)
    with pytest.raises(ValueError, match="batch_size must be at least 1 and text at least 36, got 2 and 20"):
        Work("lora", Shape(**(vars(TOY) | {"text": 20})))
    with pytest.raises(ValueError, match="keep 36 of 36 vision tokens drops nothing"):
        make_arms(Work("lora", TOY), (36,))


def test_the_script_prints_a_table_for_each_way_to_adapt(monkeypatch, capsys):
    size = [f"--{name}={value}" for name, value in vars(TOY).items()]
    monkeypatch.setattr(sys, "argv", ["bench", *size, "--keep", "4", "--repeats", "2"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts/bench_training.py"), run_name="__main__")
    assert stop.value.code in (0, 1)  # 1: at this size what the stage costs is more than it saves
    text = capsys.readouterr().out
    assert text.count("gathered") == 2
    assert "Training steps, lora: 2 x (36 vision tokens and 40 text tokens), uniform" in text
    assert "Training steps, full" in text
