"""Schedules in other loops: one step by hand, transformers' Trainer, TRL's SFTTrainer, and the two examples."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import family_folder
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import tpcompress as tp
from tpcompress.data import ChatCollator
from tpcompress.data.benchmark import load_benchmark
from tpcompress.insertion.attach import attachment_of
from tpcompress.models import load_base, load_processor
from tpcompress.training.schedules import Constant, LayerRamp, Linear, RandomBudget, Sandwich, progress_at

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "recipes" / "own_loop").glob("*.py"))
PLAN = "divprune:32@0,uniform:16@1"
TRL_DEFAULT = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor("tiny_llava")


@pytest.fixture(scope="module")
def rows() -> Any:
    return load_benchmark("train", 8)


@pytest.fixture
def model() -> Any:
    return tp.attach(load_base("tiny_llava"), PLAN)


def collator(processor: Any) -> Any:
    collate = ChatCollator(processor)
    return lambda rows: {name: value for name, value in collate(rows).items() if name != "meta"}


def retained(trace: tp.Trace, stage: int = 0) -> list[int]:
    """Retained count of the first row, call by call."""
    return [each.vision_out[0] for each in trace.stages if each.stage == stage]


def arguments(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **more: Any) -> TrainingArguments:
    return kind(
        str(folder), max_steps=3, per_device_train_batch_size=1, remove_unused_columns=False, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip


def test_a_step_by_hand(model: Any, processor: Any, rows: Any) -> None:
    batch = collator(processor)([rows[0]])
    with tp.record(model) as trace:
        for step in range(3):
            with tp.schedule_step(model, Linear(start=3, until=1.0), progress_at(step, 3)):
                model(**batch).loss.backward()
        model(**batch)
    assert retained(trace, 0) == [96, 64, 32, 32]
    assert retained(trace, 1) == [48, 32, 16, 16]


def test_layers_move_and_passes_are_drawn(processor: Any, rows: Any) -> None:
    model = tp.attach(load_base("tiny_llava"), "divprune", keep_tokens=32)
    batch = collator(processor)([rows[0]])
    with tp.record(model) as trace, torch.no_grad():
        for progress in (0.0, 1.0):
            with tp.schedule_step(model, LayerRamp(), progress):
                model(**batch)
        for draw in (0.0, 0.4, 0.9):
            with tp.schedule_step(model, Sandwich(low=0.5, high=2.0), 0.5, draw):
                model(**batch)
    assert [stage.layer for stage in trace.stages[:2]] == [1, 0]
    high, low, between = retained(trace)[2:]
    assert (high, low) == (64, 16)
    assert 16 < between < 64


def test_values_out_of_range(model: Any) -> None:
    for progress, draw in ((1.5, 0.5), (-0.1, 0.5), (0.5, 1.0)):
        with (
            pytest.raises(ValueError, match=r"progress must be in \[0, 1\] and draw in \[0, 1\)"),
            tp.schedule_step(model, Constant(), progress, draw),
        ):
            pass


def test_the_trainer_follows_a_schedule(model: Any, processor: Any, rows: Any, tmp_path: Path) -> None:
    trainer = Trainer(
        model, arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=rows, eval_dataset=rows.select([0]),
        data_collator=collator(processor), callbacks=[tp.ScheduleCallback(Linear(start=3, until=1.0))],
    )  # fmt: skip
    with tp.record(model) as trace:
        trainer.train()
        trained = len(retained(trace))
        trainer.evaluate()
    assert retained(trace)[:trained] == [96, 96, 64, 64, 32, 32]
    assert retained(trace)[trained:] == [32]


def test_drawn_budgets_repeat_with_their_seed(processor: Any, rows: Any, tmp_path: Path) -> None:
    seen = []
    for seed in (0, 0, 1):
        model = tp.attach(load_base("tiny_llava"), "uniform", keep_tokens=32)
        callback = tp.ScheduleCallback(RandomBudget(), seed=seed)
        trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, data_collator=collator(processor),
                          callbacks=[callback])  # fmt: skip
        with tp.record(model) as trace:
            trainer.train()
        seen.append(retained(trace))
    assert seen[0] == seen[1] != seen[2]
    assert len(set(seen[0])) > 1


def test_an_interrupted_step_leaves_no_budget_behind(model: Any, processor: Any, rows: Any, tmp_path: Path) -> None:
    class Interrupted(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1 and not self.done:
                self.done = True
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    trainer = Interrupted(model, arguments(tmp_path), train_dataset=rows, data_collator=collator(processor),
                          callbacks=[tp.ScheduleCallback(Linear(start=3, until=1.0))])  # fmt: skip
    trainer.done = False
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with tp.record(model) as trace:
        trainer.train()
        with torch.no_grad():
            model(**collator(processor)([rows[0]]))
    assert retained(trace) == [96, 64, 32, 32]


@TRL_DEFAULT
def test_trl_without_the_models_own_loss_fails_loudly(model: Any, processor: Any, rows: Any, tmp_path: Path) -> None:
    def pair(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["conversations"][0][:1], "completion": row["conversations"][0][1:]}

    rows = rows.map(pair, remove_columns=["conversations", "families"])
    settings = arguments(tmp_path, SFTConfig, max_length=None, bf16=False)
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=processor)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        trainer.train()


def ran(path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    return runpy.run_path(str(path))


@TRL_DEFAULT
@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem != "peft_loop"], ids=lambda path: path.stem)
def test_the_examples_train_export_and_load(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = ran(path, monkeypatch, tmp_path)
    assert left["trainer"].state.global_step == 4
    losses = [entry["loss"] for entry in left["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 4
    before = load_base("tiny_llava").state_dict()
    after = left["model"].state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert tp.verify(tmp_path / "export").ok
    assert "144 vision tokens -> 16 retained per image" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["tiny_llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_a_bare_loop_trains_gate_and_adapters(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = base if base == "tiny_llava" else family_folder(base)
    left = ran(ROOT / "recipes/own_loop/peft_loop.py", monkeypatch, tmp_path, name)
    assert len(left["losses"]) == 8
    attached = attachment_of(left["model"])
    assert attached.untrained == []
    assert attached.warned == set()
    assert all(w.any() for key, w in left["model"].named_parameters() if "lora_B" in key)
    assert tp.verify(tmp_path / "export").ok
    assert "untrained_pruners" not in json.loads((tmp_path / "export" / "manifest.json").read_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_short_and_shown_in_the_guide(path: Path) -> None:
    tree = ast.parse(path.read_text())
    body = [node for node in tree.body[1:] if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(body) <= 15
    guide = (ROOT / "scripts/docs_site/guides/own_loop.md").read_text()
    code = path.read_text().partition('"""\n\n')[2].strip()
    assert code in guide
