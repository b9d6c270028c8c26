import logging
import multiprocessing
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from training.datamodules.toy import NUM_ROWS, Interrupt, Toy, make_processor, trainer_for, write_chat

from tpcompress.training.datamodules import chat as datamodule_module
from tpcompress.training.datamodules.benchmark import BenchmarkData
from tpcompress.training.datamodules.chat import ChatData
from tpcompress.training.datamodules.samplers import LengthBucketSampler, ResumableBatchSampler


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def chat(tmp_path):
    return write_chat(tmp_path)


def run(processor, chat, tmp_path, *callbacks, ckpt_path=None, data=None, **options) -> Toy:
    module = Toy(processor)
    data = data or ChatData(str(chat), batch_size=2, seed=5, val_fraction=0.2)
    trainer_for(tmp_path, *callbacks, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


INTERRUPTIONS = {
    "within the first epoch": ("batch", 2, {}),
    "within a later epoch": ("batch", 7, {}),
    "at the last batch of an epoch": ("batch", 5, {}),
    "between accumulated steps": ("batch", 7, {"accumulate_grad_batches": 2}),
    "by a failing batch": ("failing", 7, {}),
    "at the end of an epoch": ("epoch", 0, {}),
    "at the end of an epoch, counting steps": ("epoch", 0, {"max_epochs": -1, "max_steps": 13}),
    "within an epoch, counting steps": ("batch", 7, {"max_epochs": -1, "max_steps": 13}),
    "by validation": ("validation", 0, {}),
    "by validation within an epoch": ("validation", 0, {"val_check_interval": 2}),
    "at the end of a shortened epoch": ("epoch", 0, {"limit_train_batches": 3}),
    "within a shortened epoch": ("batch", 4, {"limit_train_batches": 3}),
    "by an epoch without validation": ("batch", 7, {"limit_val_batches": 0}),
}


QUICK = ("within a later epoch", "between accumulated steps", "at the end of an epoch", "by validation within an epoch")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in INTERRUPTIONS])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(name, processor, chat, tmp_path):
    when, batch, options = INTERRUPTIONS[name]
    whole = run(processor, chat, tmp_path, **options)
    path = tmp_path / "stopped.ckpt"
    before = Toy(processor)
    data = ChatData(str(chat), batch_size=2, seed=5, val_fraction=0.2)
    with pytest.raises(KeyError, match="interrupted"):
        trainer_for(tmp_path, Interrupt(path, when, batch), **options).fit(before, data)
    assert 0 < len(before.seen) < len(whole.seen)
    resumed = run(processor, chat, tmp_path, ckpt_path=path, **options)
    assert before.seen + resumed.seen == whole.seen
    torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)
    assert not torch.equal(before.weight, whole.weight)


def test_a_finished_run_goes_on(processor, chat, tmp_path):
    whole = run(processor, chat, tmp_path, max_epochs=3)
    checkpoint = ModelCheckpoint(tmp_path / "last", save_last=True)
    first = run(processor, chat, tmp_path, checkpoint, max_epochs=2)
    rest = run(processor, chat, tmp_path, ckpt_path=tmp_path / "last" / "last.ckpt", max_epochs=3)
    assert first.seen + rest.seen == whole.seen
    torch.testing.assert_close(rest.weight, whole.weight, rtol=0, atol=0)


def test_resuming_works_with_workers(processor, chat, tmp_path):
    def data():
        return ChatData(str(chat), batch_size=2, seed=5, num_workers=1)

    whole = run(processor, chat, tmp_path, data=data())
    before, path = Toy(processor), tmp_path / "stopped.ckpt"
    with pytest.raises(KeyError, match="interrupted"):
        trainer_for(tmp_path, Interrupt(path, "batch", 8)).fit(before, data())
    resumed = run(processor, chat, tmp_path, ckpt_path=path, data=data())
    assert before.seen + resumed.seen == whole.seen


def test_resuming_with_other_batches_is_refused(processor, chat, tmp_path):
    path = tmp_path / "stopped.ckpt"
    data = ChatData(str(chat), batch_size=2)
    with pytest.raises(KeyError, match="interrupted"):
        trainer_for(tmp_path, Interrupt(path, "batch", 2)).fit(Toy(processor), data)
    other = ChatData(str(chat), batch_size=3)
    with pytest.raises(ValueError, match=r"^The checkpoint lies within an epoch[^\n]*batch_size 2 -> 3[^\n]*$"):
        run(processor, chat, tmp_path, ckpt_path=path, data=other)


def test_the_order_depends_on_seed_and_epoch_alone(processor, chat, tmp_path):
    def order(seed: int) -> list[list[int]]:
        torch.manual_seed(torch.seed() % 2**31)
        seen = run(processor, chat, tmp_path, data=ChatData(str(chat), batch_size=2, seed=seed), max_epochs=2).seen
        rows = [row for _, batch in seen for row in batch]
        return [rows[:NUM_ROWS], rows[NUM_ROWS:]]

    first = order(0)
    assert first == order(0)
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in first)
    orders = [tuple(epoch) for epoch in first + order(1)]
    assert len(set(orders)) == 4


ORDERS = {
    "shuffled": lambda n, *where: ResumableBatchSampler(n, 2, 1, *where),
    "bucketed": lambda n, *where: LengthBucketSampler(np.arange(n)[::-1] % 5, 2, 2, 1, *where),
    "in order": lambda n, *where: ResumableBatchSampler(n, 2, 1, *where, shuffle=False),
}


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("num_rows", [11, 12, 2])
def test_ranks_share_the_order(num_rows, kind):
    shares = []
    for rank in range(3):
        order = ORDERS[kind](num_rows, rank, 3)
        order.start(epoch=4, skip=0)
        shares.append(list(order))
        assert len(shares[-1]) == len(order)
        order.start(epoch=4, skip=1)
        assert list(order) == shares[-1][1:]
    assert len({tuple(map(len, share)) for share in shares}) == 1
    rows = [row for share in shares for batch in share for row in batch]
    assert len(rows) == -(-num_rows // 3) * 3
    assert set(rows) == set(range(num_rows))


def test_one_rank_sees_every_row_once_in_buckets_of_similar_length():
    lengths = np.random.default_rng(0).integers(10, 1000, 403)

    def padding(order) -> int:
        batches = list(order)
        assert sorted(sum(batches, [])) == list(range(403))
        return sum(int((lengths[b].max() - lengths[b]).sum()) for b in batches)

    plain, bucketed = ResumableBatchSampler(403, 8, 3), LengthBucketSampler(lengths, 10, 8, 3)
    assert padding(bucketed) < padding(plain) / 5
    first = list(bucketed)
    assert first == list(LengthBucketSampler(lengths, 10, 8, 3))
    means = [lengths[b].mean() for b in first]
    assert means != sorted(means)  # the batches' order is drawn again
    bucketed.start(epoch=1, skip=0)
    assert list(bucketed) != first


def test_ranks_have_similar_lengths_at_the_same_step():
    lengths = np.random.default_rng(0).integers(10, 1000, 403)

    def gaps(make) -> float:
        longest = np.array([[lengths[batch].max() for batch in make(rank)] for rank in range(4)])
        return float((longest.max(0) - longest.min(0)).mean())

    bucketed = gaps(lambda rank: LengthBucketSampler(lengths, 10, 8, 3, rank, 4))
    assert bucketed < gaps(lambda rank: ResumableBatchSampler(403, 8, 3, rank, 4)) / 4


def test_rows_that_turn_out_bad_give_way_and_are_counted(processor, chat, tmp_path, caplog):
    whole = (tmp_path / "4.jpg").read_bytes()
    (tmp_path / "4.jpg").write_bytes(whole[:-300])  # the header is sound
    data = ChatData(str(chat), batch_size=2)
    with caplog.at_level(logging.WARNING):
        module = run(processor, chat, tmp_path, data=data)
    rows = [row for _, batch in module.seen for row in batch]
    assert len(rows) == 3 * NUM_ROWS
    assert rows.count(4) == 0
    assert rows.count(5) == 6
    assert data.bad_rows.counts == {"corrupt image": 1}
    assert sum("cannot be used: corrupt image" in message for message in caplog.messages) == 1
    for workers in (0, 1):
        strict = ChatData(str(chat), batch_size=2, on_bad_row="raise", num_workers=workers)
        with pytest.raises(ValueError, match=r"^Row 4 is broken: corrupt image: [^\n]*4.jpg[^\n]*$"):
            run(processor, chat, tmp_path, data=strict)


def test_held_out_rows_are_not_trained_on(processor, chat, tmp_path):
    data = ChatData(str(chat), val_fraction=0.3, seed=3)
    run(processor, chat, tmp_path, data=data, max_epochs=1)
    train, val = ({row["id"] for row in rows} for rows in (data.train_rows, data.val_rows))
    assert (len(train), len(val)) == (8, 3)
    assert not train & val
    apart = ChatData(str(chat), val=str(chat))
    run(processor, chat, tmp_path, data=apart, max_epochs=1)
    assert (len(apart.train_rows), len(apart.val_rows)) == (NUM_ROWS, NUM_ROWS)
    assert apart.val_dataloader().batch_size == 8


def test_it_runs_without_validation_and_overfits(processor, chat, tmp_path):
    run(processor, chat, tmp_path, data=ChatData(str(chat)), max_epochs=1)
    module = run(processor, chat, tmp_path, data=ChatData(str(chat), batch_size=2), overfit_batches=1)
    assert len({tuple(rows) for _, rows in module.seen}) == 1


def test_errors_are_one_line(processor, chat, tmp_path):
    with pytest.raises(ValueError, match="val_fraction must be in"):
        ChatData(str(chat), val_fraction=1.0)
    with pytest.raises(ValueError, match="Both val"):
        ChatData(str(chat), val=str(chat), val_fraction=0.1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ChatData(str(chat), batch_size=0)
    with pytest.raises(ValueError, match="Toy has no processor"):
        run(None, chat, tmp_path)
    with pytest.raises(FileNotFoundError, match="No file or folder"):
        run(processor, chat, tmp_path, data=ChatData(str(tmp_path / "gone.json")))


def test_an_empty_data_set_is_refused(processor, chat, tmp_path, monkeypatch):
    empty = datasets.Dataset.from_dict({"images": [], "conversations": [], "families": []})
    monkeypatch.setattr(datamodule_module, "load_chat", lambda *a, **k: (empty, datamodule_module.BadRows()))
    with pytest.raises(ValueError, match="^The train data of ChatData are empty[^\n]*$"):
        run(processor, chat, tmp_path, data=ChatData(str(chat)))


def test_the_benchmark_is_packed(processor, chat, tmp_path):
    data = BenchmarkData(num_train=6, num_val=2, batch_size=2, seed=1)
    module = Toy(processor)
    shapes = []
    module.on_train_batch_start = lambda batch, batch_idx: shapes.append(batch["attention_mask"].ndim)
    trainer_for(tmp_path, max_epochs=1).fit(module, data)
    assert shapes == [4, 4, 4]
    assert (len(data.train_rows), len(data.val_rows)) == (6, 2)


@pytest.mark.parametrize("kind", ["rows", "stream"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_worker_outlives_a_run(kind, fails, processor, chat, tmp_path):
    before = set(multiprocessing.active_children())
    data = ChatData(str(chat), batch_size=2, seed=5, num_workers=2, streaming=kind == "stream")
    callbacks = [Interrupt(tmp_path / "stopped.ckpt", "batch", 2)] if fails else []
    with pytest.raises(KeyError, match="interrupted") if fails else nullcontext():
        run(processor, chat, tmp_path, *callbacks, data=data, max_epochs=-1, max_steps=3, limit_val_batches=0)
    assert set(multiprocessing.active_children()) <= before
