"""Files, folders, splits and configs: whole and streamed data read the same files of a source."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path

import datasets
import pytest
from data.record_shapes import FILES, ask, streamed

from tpcompress.data.chat import load_chat
from tpcompress.data.images import open_image
from tpcompress.data.shards import open_shards

CONFIGS = """---
configs:
- config_name: small
  data_files: [{split: train, path: small/train.jsonl}, {split: test, path: small/test.jsonl}]
- config_name: large
  data_files: [{split: train, path: large/train.jsonl}]
---
"""


def record(name: str, **keys) -> dict:
    return ask(name=name) | {"id": name} | keys


def write(path: Path, *names: str, **keys) -> Path:
    """A file with one record per name."""
    records = [record(name, **keys) for name in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    elif path.suffix == ".arrow":
        datasets.Dataset.from_list(records).save_to_disk(path.parent / "saved")
        (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            rows = csv.DictWriter(file, ["id", "messages", "image"])
            rows.writeheader()
            rows.writerows({"id": r["id"], "messages": json.dumps(r["messages"])} | keys for r in records)
    else:
        text = json.dumps(records) if ".json." in f"{path.name}." else "\n".join(map(json.dumps, records))
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def ids(source: Path, tmp_path: Path, **options) -> list[str]:
    """The rows of a source, which are the same whole and streamed."""
    rows, report = load_chat(source, cache_dir=tmp_path / "cache", **options)
    assert not len(report)
    found = sorted(row["id"] for row in rows)
    stream, bad = streamed(source, len(rows), **options)
    assert not bad
    assert sorted(stream) == found
    return found


FORMATS = ["json", "jsonl", "json.gz", "jsonl.gz", "csv", "parquet", "arrow"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_read_as_file_pattern_and_folder(suffix, tmp_path):
    folder = tmp_path / "data"
    first = write(folder / f"x-0.{suffix}", "a", "b")
    write(folder / f"x-1.{suffix}", "c")
    assert ids(first, tmp_path) == ["a", "b"]
    assert ids(folder / f"x-*.{suffix}", tmp_path) == ["a", "b", "c"]
    assert ids(folder / f"x-{{0..1}}.{suffix}", tmp_path) == ["a", "b", "c"]
    if suffix != "arrow":  # saved beside it by this test
        assert ids(folder, tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"),
        ("my_train", "my_val", "my_test"),
        ("training/x", "dev/x", "eval/x"),
        ("x", "x_valid", "x_testing"),
    ],
)
def test_a_folder_gives_the_split_that_was_asked_for(names, suffix, tmp_path):
    folder = tmp_path / "data"
    for name, split in zip(names, ("train", "validation", "test"), strict=True):
        write(folder / f"{name}.{suffix}", split)
    for split in ("train", "validation", "test"):
        assert ids(folder, tmp_path, split=split) == [split]
    for read in (load_chat, open_shards):
        with pytest.raises(ValueError, match="has no split 'holdout'; it has test, train, validation.$"):
            read(folder, split="holdout")


def test_numbered_files_name_their_own_splits(tmp_path):
    for split in ("mini", "full"):
        write(tmp_path / "data" / f"{split}-00000-of-00001.jsonl", split)
    assert ids(tmp_path / "data", tmp_path, split="mini") == ["mini"]


@pytest.mark.parametrize("kind", ["plain", "splits"])
def test_a_saved_data_set_is_streamed(kind, tmp_path):
    table = datasets.Dataset.from_list([record(name) for name in "abc"])
    data = table if kind == "plain" else datasets.DatasetDict(train=table, test=table.select([0]))
    data.save_to_disk(tmp_path / "data")
    assert ids(tmp_path / "data", tmp_path) == ["a", "b", "c"]
    if kind == "splits":
        assert ids(tmp_path / "data", tmp_path, split="test") == ["a"]
    for read in (load_chat, open_shards):
        with pytest.raises(ValueError, match="has no split 'holdout'"):
            read(tmp_path / "data", split="holdout")


def test_a_folder_with_configs_gives_the_one_that_was_asked_for(tmp_path):
    folder = tmp_path / "data"
    for name in ("small/train", "small/test", "large/train"):
        write(folder / f"{name}.jsonl", name)
    (folder / "README.md").write_text(CONFIGS)
    assert ids(folder, tmp_path, config_name="small") == ["small/train"]
    assert ids(folder, tmp_path, config_name="small", split="test") == ["small/test"]
    assert ids(folder, tmp_path, config_name="large") == ["large/train"]
    for read in (load_chat, open_shards):
        with pytest.raises(ValueError, match=r"has the configs small, large; set config_name to one of them.$"):
            read(folder)
        with pytest.raises(ValueError, match=r"has no config 'huge'; it has small, large.$"):
            read(folder, config_name="huge")


def test_a_single_file_has_neither_splits_nor_configs(tmp_path):
    path = write(tmp_path / "validation.jsonl", "a")
    assert ids(path, tmp_path) == ["a"]
    for read in (load_chat, open_shards):
        with pytest.raises(ValueError, match="has no split 'validation': it is one file or pattern"):
            read(path, split="validation")
        with pytest.raises(ValueError, match="has no config 'x': it is one file or pattern"):
            read(path, config_name="x")


def test_a_slice_of_a_split_is_read_from_tables_only(tmp_path):
    write(tmp_path / "data" / "train.parquet", "a", "b", "c")
    rows, _ = load_chat(tmp_path / "data", split="train[:2]", cache_dir=tmp_path / "cache")
    assert [row["id"] for row in rows] == ["a", "b"]
    with pytest.raises(ValueError, match=r"^A stream reads whole splits, got 'train\[:2\]'"):
        open_shards(tmp_path / "data", "train[:2]")
    write(tmp_path / "x.jsonl", "a")
    with pytest.raises(ValueError, match=r"^Only parquet and Arrow files can be sliced"):
        load_chat(tmp_path / "x.jsonl", split="train[:2]")


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "x.jsonl", "a", image="~/a.png")
    write(tmp_path / "y.jsonl", "b", image="a.png")
    (tmp_path / "images").mkdir()
    for folder in (tmp_path, tmp_path / "images"):
        (folder / "a.png").write_bytes(FILES["a.png"])
    assert ids("~/x.jsonl", tmp_path) == ["a"]
    rows, report = load_chat("~/y.jsonl", "~/images", cache_dir=tmp_path / "cache")
    assert rows[0]["images"] == [str(tmp_path / "images" / "a.png")]
    assert not len(report)


def test_file_names_of_an_image_folder_are_relative_to_its_metadata(tmp_path):
    folder = tmp_path / "data"
    write(folder / "train" / "metadata.jsonl", "a", file_name="a.png")
    (folder / "train" / "a.png").write_bytes(FILES["a.png"])
    assert ids(folder, tmp_path) == ["a"]


def test_lists_after_one_another_are_read(tmp_path):
    lists = [json.dumps([record(name) for name in names]) for names in ("ab", "", "cd")]
    (tmp_path / "x.json").write_text("\n".join(lists))
    assert ids(tmp_path / "x.json", tmp_path) == ["a", "b", "c", "d"]
    (tmp_path / "x.jsonl").write_text("".join(lists))  # a list with the suffix of lines
    assert ids(tmp_path / "x.jsonl", tmp_path) == ["a", "b", "c", "d"]


def test_a_broken_line_costs_itself_only(tmp_path):
    path = write(tmp_path / "x.jsonl", "a", "b")
    path.write_text(path.read_text() + '\n{"id": "c", \n' + json.dumps(record("d")))
    rows, report = load_chat(path, cache_dir=tmp_path / "cache")
    stream, bad = streamed(path, 3)
    assert [row["id"] for row in rows] == list(stream) == ["a", "b", "d"]
    assert report.counts == {"broken record": 1}
    assert list(bad) == ["x.jsonl:2"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_other_encodings_name_the_file(encoding, suffix, tmp_path):
    path = write(tmp_path / f"x.{suffix}", "a")
    path.write_bytes(path.read_text().replace("red", "café").encode(encoding))
    for read in (load_chat, open_shards):
        with pytest.raises(ValueError, match=r"x\.(json|jsonl|csv)") as caught:
            read(path)
        assert "UTF-8" in str(caught.value) or "utf-8" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["tif", "avif", "png", "JPEG"])
def test_images_of_a_tar_are_read(suffix, tmp_path):
    buffer = io.BytesIO()
    open_image({"bytes": FILES["a.png"], "path": None}).save(buffer, {"tif": "tiff"}.get(suffix, suffix.lower()))
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in ((f"a.{suffix}", buffer.getvalue()), ("a.json", json.dumps(ask(image="x")).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert ids(tmp_path / "x.tar", tmp_path) == ["a"]
    rows, report = load_chat(tmp_path / "x.tar", cache_dir=tmp_path / "cache")
    assert report.with_media == 1
    assert open_image(rows[0]["images"][0]).size == (6, 4)


def test_other_members_of_a_tar_are_no_images(tmp_path):
    def tar(**members: bytes) -> None:
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for ending, content in members.items():
                member = tarfile.TarInfo(f"a.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    chat = json.dumps(ask()).encode()
    for members, reason in (({"wav": b"x", "json": chat}, "unread media"), ({"txt": b"x"}, "no conversation")):
        tar(**members)
        with pytest.raises(ValueError, match=f"No usable row in .*{reason}"):
            load_chat(tmp_path / "x.tar", cache_dir=tmp_path / "cache")
    tar(heic=b"\0\0\0\x18ftypheic" * 9, json=chat)
    with pytest.raises(ValueError, match="corrupt image .*a.heic.*convert it"):
        load_chat(tmp_path / "x.tar", cache_dir=tmp_path / "cache")
