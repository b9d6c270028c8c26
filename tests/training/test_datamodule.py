import json
import logging

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from skimage import data as photos
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tpcompress.training import datamodule as datamodule_module
from tpcompress.training.datamodule import BenchmarkData, ChatData
from tpcompress.training.order import BatchOrder, BucketOrder

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + ' :' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s> ' }}{% endif %}{% endfor %}"
)
NUM_ROWS = 11


@pytest.fixture(scope="module")
def processor():
    words = ["<unk>", "</s>", "<pad>", "<image>", "which", ":", *[f"n{i}" for i in range(NUM_ROWS)]]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<image>"], **names)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )


@pytest.fixture
def chat(tmp_path):
    """Path of a LLaVA file whose i-th row has the answer n<i>; every third row is text only."""
    records = []
    for i in range(NUM_ROWS):
        image = {} if i % 3 == 2 else {"image": f"{i}.jpg"}
        Image.fromarray(photos.astronaut()[8 * i : 8 * i + 64, :64]).save(tmp_path / f"{i}.jpg")
        turns = [{"from": "human", "value": "<image> which" if image else "which"}, {"from": "gpt", "value": f"n{i}"}]
        records.append({"id": i, "conversations": turns} | image)
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(records))
    return path


class Toy(LightningModule):
    """Weights that depend on the order of the batches, not only on their set."""

    def __init__(self, processor) -> None:
        super().__init__()
        self.processor = processor
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch, batch_idx):
        meta = batch.pop("meta")
        self.seen.append((batch_idx, meta.rows))
        pixels = batch["pixel_values"].mean() if "pixel_values" in batch else 0.5
        return ((self.weight * (batch["input_ids"].float().mean() + pixels)).sin()).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val", batch["input_ids"].float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Interrupt(Callback):
    """Saves and stops as a user or a scheduler would, at a given batch."""

    def __init__(self, path, when: str, batch: int = 0) -> None:
        self.path, self.when, self.batch, self.count = path, when, batch, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.when == "failing" and self.count == self.batch:
            trainer.save_checkpoint(self.path)
            raise KeyError("interrupted")
        self.count += 1

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.when == "batch" and self.count == self.batch:
            trainer.save_checkpoint(self.path)
            raise KeyError("interrupted")

    def on_train_epoch_end(self, trainer, module) -> None:
        if self.when == "epoch":
            trainer.save_checkpoint(self.path)
            raise KeyError("interrupted")

    def on_validation_end(self, trainer, module) -> None:
        if self.when == "validation" and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise KeyError("interrupted")


def trainer_for(tmp_path, *callbacks, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet | {"max_epochs": 3} | options)


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


@pytest.mark.parametrize("name", INTERRUPTIONS)
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
    "shuffled": lambda n, *where: BatchOrder(n, 2, 1, *where),
    "bucketed": lambda n, *where: BucketOrder(np.arange(n)[::-1] % 5, 2, 2, 1, *where),
    "in order": lambda n, *where: BatchOrder(n, 2, 1, *where, shuffle=False),
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

    plain, bucketed = BatchOrder(403, 8, 3), BucketOrder(lengths, 10, 8, 3)
    assert padding(bucketed) < padding(plain) / 5
    first = list(bucketed)
    assert first == list(BucketOrder(lengths, 10, 8, 3))
    means = [lengths[b].mean() for b in first]
    assert means != sorted(means)  # the batches' order is drawn again
    bucketed.start(epoch=1, skip=0)
    assert list(bucketed) != first


def test_ranks_have_similar_lengths_at_the_same_step():
    lengths = np.random.default_rng(0).integers(10, 1000, 403)

    def gaps(make) -> float:
        longest = np.array([[lengths[batch].max() for batch in make(rank)] for rank in range(4)])
        return float((longest.max(0) - longest.min(0)).mean())

    bucketed = gaps(lambda rank: BucketOrder(lengths, 10, 8, 3, rank, 4))
    assert bucketed < gaps(lambda rank: BatchOrder(403, 8, 3, rank, 4)) / 4


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
    with pytest.raises(ValueError, match="^The train data of ChatData is empty[^\n]*$"):
        run(processor, chat, tmp_path, data=ChatData(str(chat)))


def test_the_benchmark_is_packed(processor, chat, tmp_path):
    data = BenchmarkData(num_train=6, num_val=2, batch_size=2, seed=1)
    module = Toy(processor)
    shapes = []
    module.on_train_batch_start = lambda batch, batch_idx: shapes.append(batch["attention_mask"].ndim)
    trainer_for(tmp_path, max_epochs=1).fit(module, data)
    assert shapes == [4, 4, 4]
    assert (len(data.train_rows), len(data.val_rows)) == (6, 2)
