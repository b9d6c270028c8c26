"""Records of every layout become the same row, or are left out for the same reason, whole and streamed."""

from __future__ import annotations

import copy
import functools
import json
import random
import re
from collections import Counter

import datasets
import pytest
from data.record_shapes import BAD, FILES, GOOD, LEVELS, MARKED, ONE, ask, parts, streamed

from tpcompress.data.arrow_rows import completed
from tpcompress.data.bad_rows import BadRow
from tpcompress.data.chat import load_chat
from tpcompress.data.images import open_image
from tpcompress.data.records import read_record


def names(row: dict) -> list[str]:
    """The files that the images of a row are."""
    by_level = {level: name for name, level in LEVELS.items()}
    return [by_level[open_image(image).getpixel((0, 0))[0]] for image in row["images"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    """Rows and bad rows of all shapes, whole and streamed."""
    records = [record | {"id": name} for name, (record, *_) in {**BAD, **GOOD}.items()]
    path = folder / "all.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows, report = load_chat(path, cache_dir=folder / "cache")
    return {row["id"]: row for row in rows}, report.counts, *streamed(path, len(GOOD))


@pytest.mark.parametrize("name", GOOD)
def test_a_known_layout_becomes_a_row(name, both):
    _, conversations, files = GOOD[name]
    whole, _, stream, _ = both
    assert whole[name]["conversations"] == conversations
    assert names(whole[name]) == files
    assert stream[name] == whole[name]


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_left_out_with_its_reason(name, both):
    record, reason = BAD[name]
    whole, reasons, stream, bad = both
    assert name not in whole
    assert name not in stream
    assert re.match(reason, bad[name]), bad[name]
    assert len(bad[name]) <= 200
    with pytest.raises(BadRow) as caught:
        read_record(record | {"id": name})
    assert str(caught.value) == bad[name]
    assert reasons[caught.value.reason] > 0


def test_whole_and_stream_count_the_same(both):
    _, reasons, _, bad = both
    assert sum(reasons.values()) == len(bad) == len(BAD)
    assert reasons == {reason: [text.partition(": ")[0] for text in bad.values()].count(reason) for reason in reasons}


def test_tool_schemas_and_families_are_kept(both):
    rows, *_ = both
    assert json.loads(rows["tool calls"]["tools"])[0]["function"]["name"] == "look"
    assert rows["tool calls"]["tools"] == rows["ShareGPT's function_call"]["tools"]
    assert rows["several conversations"]["families"] == ["x", "y"]
    assert rows["plain"]["families"] == ["chat"]


# ------------------------------------------------------------------ columns of Arrow

IMAGE = {"bytes": FILES["a.png"], "path": None}
part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
BINARY, TEXTS = datasets.Value("binary"), datasets.List(datasets.Value("string"))
ARROW: dict[str, tuple[list[dict], dict]] = {
    "image": ([ask(image=IMAGE)], {"image": datasets.Image()}),
    "images": ([ask(images=[IMAGE])], {"images": datasets.List(datasets.Image())}),
    "plain bytes": ([ask(image=FILES["a.png"])], {"image": BINARY}),
    "list of bytes": ([ask(images=[FILES["a.png"]])], {"images": datasets.List(BINARY)}),
    "struct of bytes": ([ask(image=IMAGE)], {"image": {"bytes": BINARY, "path": datasets.Value("string")}}),
    "inside parts": (
        [ask(parts({"type": "image", "image": IMAGE, "text": None}), [{"type": "text", "text": "red", "image": None}])],
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})},
    ),
    "old sequences": (
        [{"conversations": {"from": ["human", "gpt"], "value": ["which ?", "red"]}, "image": IMAGE}],
        {"conversations": {"from": TEXTS, "value": TEXTS}, "image": datasets.Image()},
    ),
    "JSON": ([{"messages": json.dumps(ask()["messages"]), "image": IMAGE}], {"image": datasets.Image()}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("name", ARROW)
def test_columns_of_arrow_are_read_undecoded(name, kind, tmp_path, monkeypatch):
    records, features = ARROW[name]
    table = datasets.Dataset.from_list(records)
    turns = "messages" if "messages" in records[0] else "conversations"
    chosen = {turns: table.features[turns]} | features
    table = datasets.Dataset.from_list(records, features=datasets.Features(chosen))
    target = tmp_path / "data"
    if kind == "saved":
        table.save_to_disk(target)
    else:
        target.mkdir()
        table.to_parquet(target / "x.parquet")
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *a, **k: pytest.fail("decoded"))
    rows, report = load_chat(target, cache_dir=tmp_path / "cache")
    found, _ = streamed(target, 1)
    (row,) = found.values()
    assert report.with_media == len(rows) == 1
    assert rows[0]["conversations"] == row["conversations"] == (MARKED if name == "inside parts" else ONE)
    assert names(rows[0]) == names(row) == ["a.png"]


@pytest.mark.parametrize("kind", ["int", "bool", "mask"])
def test_columns_of_arrow_that_are_no_images_are_bad_rows(kind, tmp_path):
    column = {"int": {"image": 7}, "bool": {"image": True}, "mask": {"mask": FILES["a.png"]}}[kind]
    good = ask(image=None) | {"mask": None}
    table = datasets.Dataset.from_list([good | column] + ([ask()] if kind == "mask" else []))
    table.to_parquet(tmp_path / "x.parquet")
    reason = "unread media: column 'mask' holds bytes" if kind == "mask" else "not an image: "
    with pytest.raises(ValueError, match=r"No usable row|is broken") as caught:
        load_chat(tmp_path / "x.parquet", on_bad_row="raise", cache_dir=tmp_path / "cache")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_video_column_is_kept(tmp_path):
    records = [
        ask(video="v.mp4"), ask("<video> ?", videos=["v.mp4"]), ask(videos=[["a.png", "b.png"]]),
        ask(video=["a.png", "b.png"]), ask(parts({"type": "video", "video": "v.mp4"})),
        ask(parts({"type": "video_url", "video_url": {"url": "v.mp4"}})), ask(frames=["a.png", "b.png"]),
        ask(parts({"type": "video", "video": ["a.png", "b.png"]})),
    ]  # fmt: skip
    path = tmp_path / "videos.jsonl"
    path.write_text("".join(json.dumps(record | {"id": str(i)}) + "\n" for i, record in enumerate(records)))
    rows, report = load_chat(path, check_images=False, cache_dir=tmp_path / "cache")
    assert report.with_media == len(records)
    frames = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    file = str(tmp_path / "v.mp4")
    expected = [file, file, frames, frames, file, file, frames, frames]
    assert [row["videos"] for row in rows] == [[video] for video in expected]
    assert rows[4]["conversations"][0][0]["content"] == "<video>\nwhich ?"
    stream, _ = streamed(path, len(records))
    assert list(stream.values()) == list(rows)


# ------------------------------------------------------------------ anything else

JUNK = [
    None, "", 0, -1, 3.5, float("nan"), True, [], {}, [None], [[]], [{}], {"a": 1}, b"x", "x" * 300, "\ud83d",
    "<image>", "<video>", "https://a/b.png", "data:,x", "{", "[1]", "null", {"path": 7}, {"url": {}}, {"type": "image"},
    {"role": []}, [["a", "b"]], {"from": ["a"], "value": [1]}, 10**30, object(),
]  # fmt: skip
KEYS = ("images", "image", "videos", "messages", "system", "tools", "families", "id", "history", "texts", "audio", "x")


def places(value, path=()):
    """The paths of all entries in nested dicts and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def test_damaged_records_are_rows_or_bad_rows():
    rng, records = random.Random(0), [record for record, *_ in {**GOOD, **BAD}.values()]
    outcomes = Counter()
    for _ in range(3000):
        record = copy.deepcopy(rng.choice(records))
        for _ in range(rng.choice((1, 2))):
            if rng.random() < 0.3:
                record[rng.choice(KEYS)] = copy.deepcopy(rng.choice(JUNK))
                continue
            *path, last = rng.choice(list(places(record)))
            parent = functools.reduce(lambda value, key: value[key], path, record)
            parent[last] = copy.deepcopy(rng.choice(JUNK))
        try:
            completed(read_record(record, "x"), "/images")
            outcomes["row"] += 1
        except BadRow as bad:
            outcomes[bad.reason] += 1
            assert "\n" not in str(bad)  # noqa: PT017
            assert len(str(bad)) <= 260  # noqa: PT017
    assert outcomes["row"] > 100
    assert len(outcomes) > 20
