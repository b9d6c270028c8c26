"""Streams and buckets in training: resumed at the same row, shared out over ranks, refused where they cannot be."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from training.datamodules.toy import NUM_ROWS, Interrupt, Toy, make_processor, records, trainer_for

from tpcompress.data.stream import START
from tpcompress.training.datamodules import stream_loader
from tpcompress.training.datamodules.base import data_rank
from tpcompress.training.datamodules.chat import ChatData
from tpcompress.training.datamodules.stream_loader import StreamPosition


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture
def source(tmp_path):
    """Three JSONL shards; the last row of the second is broken."""
    rows = [json.dumps(record) for record in records(tmp_path)]
    for shard, (start, stop) in enumerate(((0, 4), (4, 8), (8, NUM_ROWS))):
        broken = ["{"] if shard == 1 else []
        (tmp_path / f"part-{shard}.jsonl").write_text("\n".join(rows[start:stop] + broken))
    return tmp_path


class Named(Toy):
    """Notes what the batches are made of by their content: streamed rows have no index."""

    def training_step(self, batch, batch_idx):
        ids, bad = list(batch["meta"].ids), [row_id for row_id, _ in batch["meta"].bad_rows]
        loss = super().training_step(batch, batch_idx)
        self.seen[-1] = (batch_idx, ids)
        self.bad = [*getattr(self, "bad", []), *bad]
        return loss


def chat(source, **options) -> ChatData:
    settings = {"streaming": True, "batch_size": 2, "seed": 5, "shuffle_buffer": 3} | options
    return ChatData(str(source / "part-*.jsonl"), **settings)


def run(processor, data, tmp_path, *callbacks, ckpt_path=None, **options) -> Named:
    module = Named(processor)
    options = {"max_epochs": -1, "max_steps": 17} | options
    trainer_for(tmp_path, *callbacks, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


def stopped(processor, data, tmp_path, when: str, batch: int, **options) -> Named:
    module = Named(processor)
    options = {"max_epochs": -1, "max_steps": 17} | options
    with pytest.raises(KeyError, match="interrupted"):
        trainer_for(tmp_path, Interrupt(tmp_path / "stopped.ckpt", when, batch), **options).fit(module, data)
    return module


INTERRUPTIONS = {
    "in the first pass": ("batch", 3, {}, {}),
    "in a later pass": ("batch", 11, {}, {}),
    "by a failing batch": ("failing", 8, {}, {}),
    "between accumulated steps": ("batch", 8, {"max_steps": 9, "accumulate_grad_batches": 2}, {}),
    "within a shortened epoch": ("batch", 7, {"limit_train_batches": 4}, {}),
    "at the end of a shortened epoch": ("epoch", 0, {"limit_train_batches": 4}, {}),
    "with buckets": ("batch", 8, {}, {"bucket": 2}),
    "with workers": ("batch", 8, {}, {"num_workers": 2}),
    "with workers, at an odd batch": ("failing", 5, {}, {"num_workers": 2}),
}


QUICK = ("in a later pass", "between accumulated steps", "with buckets", "with workers, at an odd batch")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in INTERRUPTIONS])
def test_a_resumed_stream_gives_the_rows_of_an_uninterrupted_one(name, processor, source, tmp_path):
    when, batch, options, settings = INTERRUPTIONS[name]
    whole = run(processor, chat(source, **settings), tmp_path, **options)
    before = stopped(processor, chat(source, **settings), tmp_path, when, batch, **options)
    assert 0 < len(before.seen) < len(whole.seen)
    path = tmp_path / "stopped.ckpt"
    torch.load(path, weights_only=True)  # plain values only
    resumed = run(processor, chat(source, **settings), tmp_path, ckpt_path=path, **options)
    assert before.seen + resumed.seen == whole.seen
    torch.testing.assert_close(resumed.weight, whole.weight, rtol=0, atol=0)
    rows = {row for _, ids in whole.seen for row in ids}
    assert len(rows) == NUM_ROWS
    assert set(whole.bad) == {"part-1.jsonl:4"}


@pytest.mark.parametrize("workers", [0, 2])
def test_buckets_resume_within_an_epoch(workers, processor, source, tmp_path):
    def data() -> ChatData:
        return chat(source / ".", streaming=False, bucket=2, num_workers=workers)

    (source / "part.jsonl").write_text("\n".join(json.dumps(record) for record in records(source)))

    def fit(*callbacks, **options) -> Named:
        module, chosen = Named(processor), data()
        chosen.train = str(source / "part.jsonl")
        options = {"max_epochs": 3} | options
        trainer = trainer_for(tmp_path, *callbacks, **{k: v for k, v in options.items() if k != "ckpt_path"})
        try:
            trainer.fit(module, chosen, ckpt_path=options.get("ckpt_path"))
        except KeyError:
            assert callbacks
        return module

    whole = fit()
    before = fit(Interrupt(tmp_path / "stopped.ckpt", "batch", 8))
    resumed = fit(ckpt_path=tmp_path / "stopped.ckpt")
    assert len(before.seen) == 8
    assert before.seen + resumed.seen == whole.seen
    epochs = [[row for _, ids in whole.seen[at : at + 6] for row in ids] for at in (0, 6, 12)]
    assert all(len(set(epoch)) == len(epoch) == NUM_ROWS for epoch in epochs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "batch_size 2 -> 3"),
        ({"num_workers": 2}, "workers 1 -> 2"),
        ({"seed": 6, "bucket": 2}, "seed 5 -> 6, bucket 0 -> 2"),
    ],
)
def test_a_stream_shared_out_otherwise_is_not_resumed(changes, message, processor, source, tmp_path):
    stopped(processor, chat(source), tmp_path, "batch", 3)
    with pytest.raises(ValueError, match=rf"^The checkpoint lies within a stream, after batch 3, [^\n]*{message};"):
        run(processor, chat(source, **changes), tmp_path, ckpt_path=tmp_path / "stopped.ckpt")


def test_a_stream_is_not_resumed_as_a_table(processor, source, tmp_path):
    stopped(processor, chat(source), tmp_path, "batch", 3)
    table = ChatData(str(source / "part-0.jsonl"), batch_size=2)
    with pytest.raises(ValueError, match=r"^The checkpoint's data were streamed; set [^\n]*$"):
        run(processor, table, tmp_path, ckpt_path=tmp_path / "stopped.ckpt")


def test_bad_rows_of_a_stream_are_counted_once(processor, source, tmp_path):
    data = chat(source)
    run(processor, data, tmp_path)
    assert str(data.bad_rows).startswith("1 rows left out: broken record 1 (e.g. part-1.jsonl:4 (")
    with pytest.raises(ValueError, match=r"^Row part-1.jsonl:4 is broken: broken record: [^\n]*$"):
        run(processor, chat(source, on_bad_row="raise", num_workers=1), tmp_path)


def test_a_stream_validates_by_steps(processor, source, tmp_path):
    data = chat(source, val=str(source / "part-0.jsonl"))
    with pytest.raises(ValueError, match=r"^A stream has no end of an epoch[^\n]*val_check_interval[^\n]*$"):
        run(processor, data, tmp_path)
    module = Named(processor)
    module.validations = 0
    module.on_validation_start = lambda: setattr(module, "validations", module.validations + 1)
    trainer = trainer_for(tmp_path, max_epochs=-1, max_steps=9, val_check_interval=4, num_sanity_val_steps=0)
    trainer.fit(module, chat(source, val=str(source / "part-0.jsonl")))
    assert module.validations == 2
    assert len(module.seen) == 9


def test_errors_are_one_line(processor, source, tmp_path):
    with pytest.raises(ValueError, match=r"^A stream has no end: set trainer.max_steps[^\n]*$"):
        run(processor, chat(source), tmp_path, max_epochs=1, max_steps=-1)
    with pytest.raises(ValueError, match=r"^overfit_batches \(2\) needs[^\n]*$"):
        run(processor, chat(source), tmp_path, overfit_batches=2)
    with pytest.raises(ValueError, match=r"^A stream cannot hold out val_fraction \(0.1\)[^\n]*$"):
        chat(source, val_fraction=0.1)
    with pytest.raises(ValueError, match="^shuffle_buffer must be at least 1 \\(no shuffling\\), got"):
        chat(source, shuffle_buffer=0)
    with pytest.raises(ValueError, match="^bucket must be a number of batches, or 0 for no grouping, got -1"):
        chat(source, bucket=-1)
    with pytest.raises(FileNotFoundError, match=r"^No image folder [^\n]*$"):
        run(processor, chat(source, image_folder=str(source / "gone")), tmp_path)


@pytest.mark.parametrize("history", [1024, 6])
def test_batches_that_are_done_again_are_taken_back(history, monkeypatch):
    monkeypatch.setattr(stream_loader, "HISTORY", history)
    position = StreamPosition()
    position.check(0, {"workers": 2})
    for number in range(20):
        position.record(number % 2, dict(START, used=number + 1))
    assert position.fetched == 20
    state = position.state_dict(processed=17, batches=2**62)
    assert [place["used"] for place in state["places"][0]] == [17, 16]
    assert (state["number"], state["processed"]) == (17, 17)
    resumed = StreamPosition(loaded=state)
    resumed.check(0, {"workers": 2})
    assert (resumed.fetched, resumed.done) == (17, 0)
    assert resumed.before(17) == state["places"][0]
    over = position.state_dict(processed=20, batches=20)  # the epoch is over: the next one counts from 0
    assert (over["number"], over["processed"]) == (20, 0)


# ------------------------------------------------------------------ ranks


def test_ranks_are_those_that_see_different_data():
    plain = SimpleNamespace(strategy=SimpleNamespace(), global_rank=0, world_size=1)
    ddp = SimpleNamespace(
        strategy=SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 4, "rank": 3}), global_rank=3, world_size=4
    )
    tensor_parallel = SimpleNamespace(
        strategy=SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1}), global_rank=3, world_size=4
    )
    assert [data_rank(trainer) for trainer in (plain, ddp, tensor_parallel)] == [(0, 1), (3, 4), (1, 2)]


def shares(processor, source, ranks: int, batches: int, **options) -> list[list[str]]:
    """The rows of every rank under a trainer that says it is one of several."""
    found = []
    for rank in range(ranks):
        data = chat(source, **options)
        strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank})
        data.trainer = SimpleNamespace(
            strategy=strategy, global_rank=rank, world_size=ranks, max_steps=5, overfit_batches=0, limit_val_batches=0,
            limit_train_batches=1.0, val_check_interval=1.0, state=SimpleNamespace(fn="fit"),
            lightning_module=SimpleNamespace(processor=processor),
        )  # fmt: skip
        data.setup("fit")
        loader = iter(data.train_dataloader())
        found.append([row for _ in range(batches) for row in next(loader)["meta"].ids])
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_read_different_rows(workers, processor, source):
    first, second = shares(processor, source, 2, 2 if workers else 5, batch_size=1, num_workers=workers)
    assert not set(first) & set(second)
    alone = shares(processor, source, 1, NUM_ROWS, batch_size=1)[0]
    assert len(set(alone)) == NUM_ROWS
    assert set(first) | set(second) <= set(alone)


def two_ranks(rank: int, source, folder, port: int) -> None:
    """One of two processes: stops a run in the middle and goes on, streamed; then the same with a table."""
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test"}  # as under torchrun
    torch.set_num_threads(1)
    processor = make_processor()
    ddp = {"devices": 2, "strategy": "ddp", "max_epochs": -1, "max_steps": 9}
    for name, options in (("stream", {}), ("table", {"streaming": False, "bucket": 2})):

        def data(options=options) -> ChatData:
            chosen = chat(source, **options)
            chosen.train = chosen.train if chosen.streaming else str(source / "all.jsonl")
            return chosen

        whole = run(processor, data(), folder, **ddp)
        path = folder / f"{name}.ckpt"
        before = run(processor, data(), folder, Save(path, 4), **ddp | {"max_steps": 4})
        rest = run(processor, data(), folder, ckpt_path=path, **ddp)
        seen = {"whole": whole.seen, "parts": before.seen + rest.seen}
        (folder / f"{name}-{rank}.pkl").write_bytes(pickle.dumps(seen))


class Save(Interrupt):
    """Saves at a batch and does not interrupt."""

    def __init__(self, path, batch: int) -> None:
        super().__init__(path, "save", batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.count == self.batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.slow
def test_two_processes_resume_their_own_rows(source, tmp_path):
    import socket

    (source / "all.jsonl").write_text("\n".join(json.dumps(record) for record in records(source)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, (source, tmp_path, port), nprocs=2)
    for name in ("stream", "table"):
        ranks = [pickle.loads((tmp_path / f"{name}-{rank}.pkl").read_bytes()) for rank in range(2)]
        assert all(rank["whole"] == rank["parts"] for rank in ranks)
        assert [len(rank["whole"]) for rank in ranks] == [9, 9]
        first = [{row for _, ids in rank["whole"][:2] for row in ids} for rank in ranks]
        assert not first[0] & first[1]
