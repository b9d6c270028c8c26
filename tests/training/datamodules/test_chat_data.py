"""What `ChatData` refuses, says and passes on: runs without images, validation, skipped and cut rows, videos."""

from __future__ import annotations

import json
import logging

import pytest
from training.datamodules.toy import NUM_ROWS, Toy, make_processor, records, trainer_for, write_chat

from tpcompress.data.video import VideoSampling
from tpcompress.training.datamodules.benchmark import BenchmarkData
from tpcompress.training.datamodules.chat import ChatData


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def run(processor, data, tmp_path, plan=None, **options) -> None:
    module = Toy(processor)
    module.plan = plan
    trainer_for(tmp_path, **{"max_epochs": -1, "max_steps": 6} | options).fit(module, data)


def said(caplog) -> list[str]:
    """Warnings of this package."""
    records = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in records if record.name.startswith("tpcompress.")]


def write(folder, rows: list[dict], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def without_images(folder) -> str:
    rows = [{**row, "conversations": [{"from": "human", "value": "which"}, row["conversations"][1]]}
            for row in records(folder)]  # fmt: skip
    return write(folder, [{key: value for key, value in row.items() if key != "image"} for row in rows])


def test_a_plan_needs_rows_with_images(processor, tmp_path, caplog):
    path = without_images(tmp_path)
    message = rf"^None of the {NUM_ROWS} usable rows of .*rows.jsonl holds an image or a video, so the plan"
    with pytest.raises(ValueError, match=message):
        run(processor, ChatData(path, batch_size=2), tmp_path, plan={"stages": []})
    run(processor, ChatData(path, batch_size=2), tmp_path)  # the dense model learns from text
    assert not said(caplog)
    run(processor, ChatData(path, batch_size=2, streaming=True), tmp_path, plan={"stages": []})
    (warning,) = said(caplog)
    assert warning.startswith(f"None of the first {NUM_ROWS} rows of {path} holds an image or a video")


def test_one_row_with_an_image_is_enough_for_a_plan(processor, tmp_path, caplog):
    path = str(write_chat(tmp_path))
    for streaming in (False, True):
        run(processor, ChatData(path, batch_size=2, streaming=streaming), tmp_path, plan={"stages": []})
    assert not said(caplog)


@pytest.mark.parametrize("streaming", [False, True])
def test_skipped_rows_are_told_at_the_end(streaming, processor, tmp_path, caplog):
    rows = records(tmp_path)
    for index in (0, 1, 3):
        whole = (tmp_path / f"{index}.jpg").read_bytes()
        (tmp_path / f"{index}.jpg").write_bytes(whole[: len(whole) // 2])  # the header is whole
    data = ChatData(write(tmp_path, rows), batch_size=2, streaming=streaming, shuffle_buffer=1)
    run(processor, data, tmp_path, max_steps=12)
    assert data.bad_rows.counts == {"corrupt image": 3}
    of = "" if streaming else f" of {NUM_ROWS}"
    assert said(caplog)[-1].startswith(f"Training data: 3{of} rows left out: corrupt image 3 (e.g. ")


def test_cut_answers_are_told(processor, tmp_path, caplog):
    rows = [
        {"conversations": [{"from": "human", "value": "which"}, {"from": "gpt", "value": answer}]}
        for answer in ("n1", "n1 n2 n3 n4 n5 n6", "n2", "n3 n3 n3 n3 n3 n3")
    ]
    data = ChatData(write(tmp_path, rows), batch_size=2, max_length=5)
    run(processor, data, tmp_path, max_steps=4)
    assert (data.num_cut, data.num_sequences) == (4, 8)
    assert [text for text in said(caplog) if "cut" in text] == [
        "A conversation is cut at max_length (5 tokens); further ones are counted.",
        "Training data: 4 of 8 sequences were cut at 5 tokens.",
    ]


def test_rows_beyond_the_positions_of_the_model_are_left_out(processor, tmp_path):
    rows = [
        {"id": answer, "conversations": [{"from": "human", "value": "which"}, {"from": "gpt", "value": answer}]}
        for answer in ("n1", "n1 n2 n3 n4 n5 n6", "n2")
    ]
    path = write(tmp_path, rows)
    for max_length, counts in ((None, {"too long": 1}), (5, {})):
        data, module = ChatData(path, batch_size=3, max_length=max_length), Toy(processor)
        module.max_positions = 6
        trainer_for(tmp_path, max_epochs=1).fit(module, data)
        assert data.bad_rows.counts == counts
        assert data.num_cut == len(counts) ^ 1


@pytest.mark.parametrize("kind", ["whole", "stream", "benchmark"])
def test_validation_needs_data(kind, processor, tmp_path):
    path = str(write_chat(tmp_path))
    data = BenchmarkData(4, 0) if kind == "benchmark" else ChatData(path, streaming=kind == "stream")
    keys = "num_val of BenchmarkData" if kind == "benchmark" else "val or val_fraction of ChatData"
    with pytest.raises(ValueError, match=f"^There are no validation data; set {keys}.$"):
        trainer_for(tmp_path).validate(Toy(processor), data)
    trainer_for(tmp_path).validate(Toy(processor), ChatData(path, val_fraction=0.2))


def test_held_out_rows_share_no_image_with_training_rows(processor, tmp_path):
    rows = records(tmp_path)
    data = ChatData(write(tmp_path, [row | {"id": f"{row['id']}-{copy}"} for row in rows for copy in range(3)]),
                    val_fraction=0.3)  # fmt: skip
    train, held = data.load_rows()
    images = [{image for row in side for image in row["images"]} for side in (train, held)]
    assert not images[0] & images[1]
    assert len(train) + len(held) == 3 * NUM_ROWS
    assert len(held) > 3


def test_settings_reach_the_reader_and_the_collator(processor, tmp_path, monkeypatch):
    path, asked = str(write_chat(tmp_path)), {}
    monkeypatch.setattr("tpcompress.training.datamodules.chat.ChatCollator", lambda *a, **k: asked.update(k))
    settings = {"pack_sequences": True, "learn_from": "last", "max_length": 50}
    ChatData(path, num_frames=3, fps=1.5, **settings).make_collator(processor, 99)
    known = {"pack_sequences": True, "learn_from": "last", "video": VideoSampling(3, 1.5), "max_positions": 99}
    assert asked == known
    with pytest.raises(ValueError, match="has no config 'x'"):
        ChatData(path, config_name="x").load_rows()
    with pytest.raises(ValueError, match="^num_frames must be at least 1 frame, got 0"):
        ChatData(path, num_frames=0)


def test_a_missing_video_package_is_one_line(processor, tmp_path, monkeypatch):
    rows = [row | {"video": "v.mp4"} for row in records(tmp_path)]
    (tmp_path / "v.mp4").write_bytes(b"\0" * 64)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    message = r"^av is not installed; it decodes videos. Install it with: pip install 'tpcompress\[media\]'$"
    with pytest.raises(ImportError, match=message):
        run(processor, ChatData(write(tmp_path, rows), batch_size=2), tmp_path)
