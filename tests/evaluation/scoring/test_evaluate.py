import json

import numpy as np
import pytest
import torch
from rich.progress import Progress

import tpcompress as tp
from tpcompress.data import load_chat
from tpcompress.evaluation.scoring.evaluate import evaluate, prepare
from tpcompress.evaluation.scoring.generate import evaluate_by_generation

PLANS = {
    "dense": None,
    "divprune": tp.PruningPlan([tp.Stage("divprune", keep_tokens=9)]),
    "pool": tp.PruningPlan([tp.Stage("pool", keep_tokens=9)], positions="compact"),
    "dart": tp.PruningPlan([tp.Stage({"type": "dart", "text_pivots": 0}, layer=1, keep_ratio=0.2)]),
    "fastv": tp.PruningPlan([tp.Stage("fastv", layer=2, keep_tokens=4)]),
    "two stages": tp.PruningPlan([tp.Stage("uniform", keep_tokens=32), tp.Stage("fastv", layer=1, keep_tokens=5)]),
}


def attached(model, plan):
    return model if plan is None else tp.attach(model, plan)


@pytest.mark.parametrize("name", PLANS)
def test_teacher_forcing_agrees_with_generation(vqa, processor, rows, name):
    model = attached(vqa, PLANS[name])
    scores = evaluate(model, processor, rows, metric="exact_match")
    slow = evaluate_by_generation(model, processor, rows)
    assert np.array_equal(scores.value_IF, slow.value_IF)
    assert np.array_equal(scores.count_IF, slow.count_IF)
    assert 0 < scores.value_IF.sum() < scores.count_IF.sum()
    assert scores.score == slow.score
    assert scores.ci95 == slow.ci95


@pytest.mark.parametrize("name", [name for name, plan in PLANS.items() if plan is None or not plan.reads_prompt])
def test_packed_scores_equal_separate_ones(vqa, processor, rows, name):
    model = attached(vqa, PLANS[name])
    packed = evaluate(model, processor, rows, pack=True)
    separate = evaluate(model, processor, rows, pack=False, batch_size=7)
    for name, exact in (("exact_match", True), ("token_accuracy", True), ("log_likelihood", False)):
        for together, alone in zip(packed.sums[name], separate.sums[name], strict=True):
            assert np.array_equal(together, alone) if exact else np.allclose(together, alone, rtol=1e-4)


def test_rows_and_families_are_counted_where_they_belong(vqa, processor, rows):
    scores = evaluate(vqa, processor, rows, batch_size=5)
    for index, row in enumerate(rows):
        for family in set(row["families"]):
            assert scores.count_IF[index, scores.names.index(family)] == row["families"].count(family)
    assert sum(scores.counts.values()) == scores.count_IF.sum() == sum(len(f) for f in rows["families"])
    assert scores.num_images == len(rows)
    assert scores.score == pytest.approx(np.mean(list(scores.families.values())))


def test_batch_size_changes_nothing(vqa, processor, rows):
    model = attached(vqa, PLANS["divprune"])
    one, many = evaluate(model, processor, rows, batch_size=1), evaluate(model, processor, rows, batch_size=64)
    assert np.array_equal(one.value_IF, many.value_IF)


def test_prepared_batches_give_the_same_scores_as_often_as_wanted(vqa, processor, rows):
    ready = prepare(processor, rows, batch_size=5)
    scores = evaluate(vqa, processor, rows)
    for _ in range(2):
        again = evaluate(vqa, processor, ready)
        assert np.array_equal(again.value_IF, scores.value_IF)
    model = attached(vqa, PLANS["fastv"])
    with pytest.raises(ValueError, match="reads the prompt; evaluate with pack=False"):
        evaluate(model, processor, ready)


def test_blank_images_are_all_alike(vqa, processor, rows):
    seen = []
    vqa.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0]), with_kwargs=True
    )
    blind = evaluate(vqa, processor, rows, blank=True)
    assert all((pixels == seen[0][:1]).all() for pixels in seen)
    assert len(seen)
    assert blind.overall("log_likelihood") != evaluate(vqa, processor, rows).overall("log_likelihood")


def test_modes_are_restored(vqa, processor, rows):
    vqa.train()
    vqa.model.vision_tower.eval()
    before = [module.training for module in vqa.modules()]
    evaluate(vqa, processor, rows.select(range(2)))
    assert [module.training for module in vqa.modules()] == before
    assert all(parameter.grad is None for parameter in vqa.parameters())


def test_chat_counts_tokens_and_loss(vqa, processor, rows):
    chat = [dict(row, families=["chat"] * len(row["families"])) for row in rows.select(range(4))]
    scores, closed = evaluate(vqa, processor, chat), evaluate(vqa, processor, rows.select(range(4)))
    assert scores.names == ("chat",)
    assert scores.score == scores.by_family("token_accuracy")["chat"] == pytest.approx(closed.overall("token_accuracy"))
    assert scores.by_family("exact_match")["chat"] == pytest.approx(closed.value_IF.sum() / closed.count_IF.sum())
    assert scores.by_family("exact_match")["chat"] < scores.score
    assert scores.overall("log_likelihood") == pytest.approx(closed.overall("log_likelihood"), rel=1e-5)


def test_broken_rows_are_left_out_and_counted(vqa, processor, rows):
    broken = [dict(rows[0], images=["nowhere.png"]), rows[1]]
    scores = evaluate(vqa, processor, broken)
    assert scores.skipped == 1
    assert scores.num_images == 1
    with pytest.raises(ValueError, match="None of the 1 rows can be evaluated; the last one: missing image"):
        evaluate(vqa, processor, broken[:1])


def test_not_finite_logits_are_one_line(vqa, processor, rows):
    vqa.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite") as caught:
        evaluate(vqa, processor, rows)
    assert "\n" not in str(caught.value)


def test_packing_needs_a_fitting_attention(vqa, processor, rows):
    vqa.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention 'eager' does not take their mask"):
        evaluate(vqa, processor, rows, pack=True)
    assert evaluate(vqa, processor, rows.select(range(2))).num_images == 2


def test_progress_ends_full_and_leaves_nothing(vqa, processor, rows):
    with Progress(disable=True) as progress:
        evaluate(vqa, processor, rows, progress=progress)
        assert not progress.tasks


def test_chat_data_is_scored_as_it_was_read(vqa, processor, rows, tmp_path):
    """Its rows make their families as they are read; no column has them."""
    records = []
    for number in range(3):
        rows[number]["images"][0].save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
        records.append({"id": number, "image": f"{number}.png", "conversations": turns})
    (tmp_path / "chat.json").write_text(json.dumps(records))
    data, _ = load_chat(tmp_path / "chat.json", cache_dir=str(tmp_path / "cache"))
    scores = evaluate(vqa, processor, data)
    assert np.array_equal(scores.count_IF, evaluate(vqa, processor, list(data)).count_IF)
    assert scores.count_IF.sum() == 3
