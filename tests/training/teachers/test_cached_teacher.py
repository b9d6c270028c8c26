"""Answers on disk: as good as asking, up to what is cut off, and whole or not there."""

import json
from types import SimpleNamespace

import pytest
import torch
from support import answer_labels, batch, scramble, tiny_model

from tpcompress.data import ChatCollator
from tpcompress.families import resolve
from tpcompress.models import load_processor
from tpcompress.training.datamodules.benchmark import BenchmarkData
from tpcompress.training.losses.jsd import JSD
from tpcompress.training.losses.kl import KL
from tpcompress.training.passes import run_pass
from tpcompress.training.teachers import cache
from tpcompress.training.teachers.cache import cache_teacher, fingerprint, read_index, write_answers
from tpcompress.training.teachers.cached import Cached

SAMPLES = [(3, 2, 6), (1, 1, 9), (12, 0, 5)]


def batches(number=3):
    for seed in range(number):
        inputs = batch(SAMPLES, seed=seed)
        inputs["labels"] = answer_labels(inputs, words=2 + seed)
        names = [f"{seed}-{b}" for b in range(len(SAMPLES))]
        yield inputs | {"meta": SimpleNamespace(ids=names, num_answers=len(SAMPLES) * (2 + seed))}


def student(inputs):
    """A model near the teacher, but not the same."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return run_pass(model, inputs)


def reader(folder, base=None):
    teacher = Cached(str(folder))
    base = base or tiny_model()
    teacher.prepare(base, resolve(base), None, None)
    return teacher


@pytest.fixture
def folder(tmp_path):
    assert write_answers(tiny_model(), batches(), tmp_path / "answers", top=100, per_shard=4) == 9
    return tmp_path / "answers"


# ------------------------------------------------------------------ as good as asking


def test_a_cache_gives_the_losses_of_its_teacher(folder):
    teacher, model = reader(folder), tiny_model()
    assert len(list(folder.glob("*.safetensors"))) == 3
    for inputs in batches():
        here = student(inputs)
        with torch.no_grad():
            asked = run_pass(model, inputs)
        taught = teacher(None, inputs, here, 0.5)
        kept = asked.logits_AC.log_softmax(1).gather(1, taught.top_indices_AT)
        torch.testing.assert_close(taught.logits_AC, kept, atol=2e-3, rtol=1e-3)  # fp16
        assert torch.equal(taught.sample_A, asked.sample_A)
        p, log_q = asked.logits_AC.softmax(1), here.logits_AC.log_softmax(1)
        rest = torch.ones_like(p).scatter(1, taught.top_indices_AT, 0.0)
        # By the log-sum inequality what is missed is what the two disagree about within the rest.
        p_rest, q_rest = (p * rest).sum(1), (log_q.exp() * rest).sum(1)
        missed = (rest * p * (p.log() - log_q)).sum(1) - p_rest * (p_rest / q_rest).log()
        full, part = KL()(here, asked), KL()(here, taught)
        assert 0 < missed.mean() < full
        torch.testing.assert_close(full - part, missed.mean(), atol=1e-3, rtol=0)
        assert abs(JSD()(here, asked) - JSD()(here, taught)) < 0.01
        assert full > 0.05


def test_more_tokens_miss_less(tmp_path):
    (inputs,) = batches(1)
    here, gaps = student(inputs), []
    full = KL()(here, run_pass(tiny_model(), inputs))
    for top in (4, 32, 120):
        write_answers(tiny_model(), batches(1), tmp_path / str(top), top=top)
        gaps.append((full - KL()(here, reader(tmp_path / str(top))(None, inputs, here, 0.0))).item())
    assert gaps[0] > gaps[1] > gaps[2] > -1e-3
    assert gaps[0] > 0.02


def test_the_order_and_the_company_of_sequences_do_not_matter(folder):
    first, *_ = batches()
    inputs = batch(SAMPLES, seed=0)
    turned = {"input_ids": inputs["input_ids"].flip(0), "attention_mask": inputs["attention_mask"].flip(0)}
    pixels = inputs["pixel_values"]
    turned |= {"pixel_values": torch.cat([pixels[2:], pixels[:2]])}
    turned |= {"labels": first["labels"].flip(0), "meta": SimpleNamespace(ids=["0-2", "0-1", "0-0"], num_answers=6)}
    taught = reader(folder)(None, turned, student(turned), 0.0)
    asked = run_pass(tiny_model(), turned).logits_AC.log_softmax(1).gather(1, taught.top_indices_AT)
    torch.testing.assert_close(taught.logits_AC, asked, atol=5e-3, rtol=1e-3)


def test_a_data_modules_rows_are_found_again(tmp_path):
    data = BenchmarkData(num_train=6, num_val=0, batch_size=2)
    more = {"top": 8, "dtype": "float32"}
    shares = [cache_teacher("tiny_llava", data, str(tmp_path), **more, rank=rank, world_size=2) for rank in (0, 1)]
    collator = ChatCollator(load_processor("tiny_llava"), data.max_length, data.pack)
    rows = data.load_rows()[0]
    names = {name for row in rows for name in collator([row])["meta"].ids}
    assert sum(shares) == len(names) == 6
    assert set(read_index(tmp_path)) == names
    assert cache_teacher("tiny_llava", data, str(tmp_path), **more) == 0


# ------------------------------------------------------------------ whole or not there


def test_an_interrupted_writer_goes_on_where_it_stopped(tmp_path, folder):
    def broken():
        found = batches()
        yield next(found)
        yield next(found)
        raise KeyboardInterrupt

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        write_answers(tiny_model(), broken(), part, top=100, per_shard=4)
    held = read_index(part)
    assert set(held) == {"0-0", "0-1", "0-2", "1-0"}
    before = {path.name: path.read_bytes() for path in part.glob("*.safetensors")}
    assert write_answers(tiny_model(), batches(), part, top=100, per_shard=4) == 5
    assert all((part / name).read_bytes() == content for name, content in before.items())
    assert set(read_index(part)) == set(read_index(folder))
    for inputs in batches():
        here = student(inputs)
        one, two = reader(part)(None, inputs, here, 0.0), reader(folder)(None, inputs, here, 0.0)
        assert torch.equal(one.logits_AC, two.logits_AC)
        assert torch.equal(one.top_indices_AT, two.top_indices_AT)
    assert write_answers(tiny_model(), batches(), part, top=100) == 0


def test_a_shard_that_was_being_written_is_not_there(tmp_path, monkeypatch):
    def killed(tensors, path, metadata):
        path.write_bytes(b"half of a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            write_answers(tiny_model(), batches(), tmp_path, top=8)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    killed_at_once = tmp_path / "answers-000-000000.7.part.safetensors"  # SIGKILL leaves it
    killed_at_once.write_bytes(b"half of a file")
    assert read_index(tmp_path) == {}
    assert write_answers(tiny_model(), batches(), tmp_path, top=8) == 9
    assert len(read_index(tmp_path)) == 9
    assert (tmp_path / "answers-000-000000.safetensors").is_file()


# ------------------------------------------------------------------ refusals


def refused(message):
    return pytest.raises(ValueError, match=rf"^{message}[^\n]*$")


def test_a_sequence_that_is_not_there(folder):
    (inputs,) = batches(1)
    inputs["meta"].ids[1] = "unseen"
    with refused(r"The cache \S+ has no sequence unseen among its 9;"):
        reader(folder)(None, inputs, student(inputs), 0.0)
    inputs["meta"] = SimpleNamespace(num_answers=6)
    with refused("Teacher Cached finds answers by meta.ids"):
        reader(folder)(None, inputs, student(inputs), 0.0)


def test_another_base_or_vocabulary(folder):
    with refused(r"The cache \S+ was written for another base"):
        reader(folder, scramble(tiny_model(), 9))
    (inputs,) = batches(1)
    here = student(inputs)
    here.logits_AC = here.logits_AC[:, :-1]
    with refused(r"The cache \S+ has a vocabulary of 128, the model has 127"):
        reader(folder)(None, inputs, here, 0.0)


def test_answers_that_are_not_as_many(folder):
    (inputs,) = batches(1)
    here = student(inputs)
    here.targets_A = here.targets_A[1:]
    with refused("Teacher and student predict 6 and 5 answer tokens"):
        reader(folder)(None, inputs, here, 0.0)


def test_folders_that_hold_something_else(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^No cached answers in [^\n]*$"):
        reader(tmp_path / "nothing")
    with refused(r"\S+ contains a cache with another top"):
        write_answers(tiny_model(), batches(), folder, top=7)
    with refused("top must be at least 1 and below the vocabulary of 128, got 128"):
        write_answers(tiny_model(), batches(), tmp_path / "all", top=128)
    shard = next(iter(folder.glob("*.safetensors")))
    shard.write_bytes(b"noise")
    with refused(r"\S+ is not a file of cached answers"):
        reader(folder)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 0}))
    with refused(r"The cache \S+ has version 0"):
        reader(folder)


def test_a_fingerprint_is_of_the_weights_and_of_no_dtype():
    mark = fingerprint(tiny_model())
    assert mark == fingerprint(tiny_model().to(torch.bfloat16)) == fingerprint(tiny_model())
    assert mark != fingerprint(scramble(tiny_model(), 9))
    assert fingerprint(tiny_model().to("meta")) is None
