"""Learned pruners, losses and metrics in other loops: what trains, in which mode, and what is said when it does not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import tpcompress as tp
from tpcompress.data import ChatCollator
from tpcompress.data.benchmark import load_benchmark
from tpcompress.insertion.attach import attachment_of
from tpcompress.models import load_base, load_processor

CUT = {"selector": "straight_through", "applier": "gather_value"}
"""A gate that learns on cut sequences."""


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor("tiny_llava")


@pytest.fixture(scope="module")
def rows() -> Any:
    rows = map(dict, load_benchmark("train", 3))
    return [row | {name: row[name][:1] for name in ("conversations", "families")} for row in rows]


@pytest.fixture(scope="module")
def batch(processor: Any, rows: Any) -> dict[str, Any]:
    return collator(processor)([rows[0]])  # type: ignore[no-any-return]


def collator(processor: Any) -> Any:
    collate = ChatCollator(processor)
    return lambda rows: {name: value for name, value in collate(rows).items() if name != "meta"}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=1, remove_unused_columns=False, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip


def gated(**parts: Any) -> Any:
    torch.manual_seed(0)
    return tp.attach(load_base("tiny_llava"), {"type": "learned_gate", **parts}, keep_tokens=16)


def grads(model: Any) -> tuple[bool, bool]:
    """Whether the pruner has a gradient, and whether anything else has."""
    pruners = {id(weight) for weight in attachment_of(model).pruners.parameters()}
    has = [(id(w) in pruners, w.grad is not None and bool(w.grad.any())) for w in model.parameters()]
    model.zero_grad()
    return any(g for own, g in has if own), any(g for own, g in has if not own)


def width(model: Any, batch: dict[str, Any]) -> int:
    """Columns of the logits of a call."""
    return int(model(**batch).logits.shape[1])


# ------------------------------------------------------------------------------------------------------ trainable


def test_what_trains_at_which_length(batch: dict[str, Any]) -> None:
    model, full = gated(), batch["input_ids"].shape[1]
    for what, wanted, columns in (
        ("pruner", (True, False), full), ("rest", (False, True), full - 128), ("all", (True, True), full)
    ):  # fmt: skip
        weights = tp.trainable(model, what)
        assert {id(w) for w in weights} == {id(w) for w in model.parameters() if w.requires_grad}
        output = model(**batch)
        output.loss.backward()
        assert output.logits.shape[1] == columns, what
        assert grads(model) == wanted, what
    with torch.no_grad():
        assert width(model.eval(), batch) == full - 128
    with torch.no_grad(), tp.mode(model.train(), "off"):
        assert width(model, batch) == full
    assert width(model, batch) == full, "the block restored the mode that learns"


def test_a_gate_that_learns_on_cut_sequences_is_not_run_at_full_length(batch: dict[str, Any]) -> None:
    model = gated(**CUT)
    tp.trainable(model)
    output = model(**batch)
    output.loss.backward()
    assert output.logits.shape[1] == batch["input_ids"].shape[1] - 128
    assert grads(model) == (True, True)
    assert attachment_of(model).warned == set()


def test_a_frozen_gate_selects_as_in_the_export(batch: dict[str, Any]) -> None:
    model = gated(selector="gumbel_topk", applier="gather_value")
    tp.trainable(model, "rest")
    with tp.record(model) as trace:
        model(**batch)
        model(**batch)
        model.eval()(**batch)
    kept = [stage.retained_RV for stage in trace.stages]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert all(pruner.training for pruner in attachment_of(model.train()).pruners)


def test_mistakes_are_one_line() -> None:
    model = load_base("tiny_llava")
    with pytest.raises(ValueError, match="No plan is attached"):
        tp.trainable(model)
    tp.attach(model, "uniform", keep_tokens=16)
    for what, message in (("gate", "what must be one of all, pruner, rest"), ("pruner", "No pruner of this plan has")):
        with pytest.raises(ValueError, match=message):
            tp.trainable(model, what)


# ------------------------------------------------------------------------------------------------------- warnings


def test_a_gate_without_a_gradient_warns_once_and_the_export_says_so(
    batch: dict[str, Any], processor: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = gated().train()
    with pytest.warns(UserWarning, match=r"'learned_gate' has weights .* call tpcompress.trainable\(model\)"):
        model(**batch).loss.backward()
    assert grads(model) == (False, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**batch)
        with torch.no_grad():
            gated().train()(**batch)
        gated().eval()(**batch)
        with tp.mode(fresh := gated().train(), "drop"):  # as `tpcompress fit` trains the rest
            fresh(**batch)
    assert attachment_of(model).untrained == ["learned_gate"]
    tp.save_pretrained(model.eval(), tmp_path / "export", processor=processor)
    assert "was not trained: learned_gate" in (tmp_path / "export" / "README.md").read_text()
    assert "Not trained, with the weights it was built with: learned_gate" in caplog.text


def test_embeddings_that_the_caller_merged_warn_once(batch: dict[str, Any]) -> None:
    model = tp.attach(load_base("tiny_llava"), "uniform", keep_tokens=16)
    embeds, mask = model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]
    with torch.no_grad():
        with pytest.warns(UserWarning, match="inputs_embeds without input_ids and pixel_values, so it is not pruned"):
            output = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model(inputs_embeds=embeds, attention_mask=mask)
            other = tp.attach(load_base("tiny_llava"), "uniform", keep_tokens=16)
            other(inputs_embeds=embeds[:, -1:], past_key_values=output.past_key_values)
            other.generate(**{k: v for k, v in batch.items() if k != "labels"}, max_new_tokens=2)
            other(input_ids=batch["input_ids"][:, -3:])


# ---------------------------------------------------------------------------------------------------------- mixin


class PrunedTrainer(tp.TrainerMixin, Trainer):
    """As in the guide."""


def counted(prediction: Any) -> dict[str, float]:
    """Accuracy of the answer tokens, by the usual shift."""
    logits, labels = torch.tensor(prediction.predictions[0]), torch.tensor(prediction.label_ids)
    assert logits.shape[:2] == labels.shape
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
    return {"right": float(right.float().mean()), "tokens": len(right)}


def test_metrics_and_smoothing_follow_the_pruned_sequence(
    processor: Any, rows: Any, batch: dict[str, Any], tmp_path: Path
) -> None:
    model = tp.attach(load_base("tiny_llava"), "divprune", keep_tokens=16).eval()
    make = lambda kind, **more: kind(  # noqa: E731
        model, arguments(tmp_path, per_device_eval_batch_size=2, **more), eval_dataset=rows,
        data_collator=collator(processor), compute_metrics=counted,
    )  # fmt: skip
    with pytest.raises(AssertionError):
        make(Trainer).evaluate()
    found = make(PrunedTrainer).evaluate()
    assert found["eval_tokens"] == sum(int((collator(processor)([row])["labels"][:, 1:] != -100).sum()) for row in rows)
    assert found["eval_right"] > 0.5
    smooth = make(PrunedTrainer, label_smoothing_factor=0.1)
    with tp.record(model) as trace, torch.no_grad():
        loss, outputs = smooth.compute_loss(model, dict(batch), return_outputs=True)
    logits, labels = outputs.logits[0, :-1], trace.labels_BN[0, 1:]
    assert loss == pytest.approx(float(F.cross_entropy(logits, labels, label_smoothing=0.1)), abs=1e-5)
    assert loss > outputs.loss + 0.01
    smooth.train_dataset = rows
    smooth.train()
    assert smooth.state.global_step == 3


def test_an_own_loss_function_gets_shortened_labels(
    processor: Any, rows: Any, batch: dict[str, Any], tmp_path: Path
) -> None:
    model = tp.attach(load_base("tiny_llava"), "divprune", keep_tokens=16).eval()

    def double(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return 2 * F.cross_entropy(outputs.logits[0, :-1], labels[0, 1:])

    trainer = PrunedTrainer(model, arguments(tmp_path), data_collator=collator(processor), compute_loss_func=double)
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    assert float(loss) == pytest.approx(2 * float(outputs.loss), rel=1e-5)
    dense = PrunedTrainer(load_base("tiny_llava").eval(), arguments(tmp_path), data_collator=collator(processor))
    with torch.no_grad():
        assert float(dense.compute_loss(dense.model, dict(batch))) == pytest.approx(float(dense.model(**batch).loss))
