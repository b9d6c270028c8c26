import gzip
import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
from torch.utils.data import DataLoader

from tpcompress.data import BadRow, stream
from tpcompress.data.rows import open_image
from tpcompress.data.shards import Shards, open_shards
from tpcompress.data.stream import START, ChatStream, Sharing

datasets.disable_progress_bars()


class Names:
    """A collator that makes the rows' ids, or what it is told to, of them; some rows turn out bad."""

    def __init__(self, bad: tuple[str, ...] = (), look=lambda row: row["id"]) -> None:
        self.bad, self.look = bad, look

    def encode(self, row: dict, index: int):
        if row["id"] in self.bad:
            raise BadRow("corrupt image: in this test")
        return self.look(row)

    def pad(self, samples: list) -> tuple[list, list]:
        return [sample for sample, _ in samples], [row_id for _, bad in samples for row_id, _ in bad]


def talk(number: int, image: str | None = None) -> dict:
    turns = [{"from": "human", "value": "<image> which ?" if image else "which ?"}]
    turns.append({"from": "gpt", "value": f"n{number}"})
    return {"id": f"r{number}", "conversations": turns} | ({"image": image} if image else {})


def take(source: ChatStream, batches: int, workers: int = 0) -> list:
    loader = iter(DataLoader(source, batch_size=None, num_workers=workers, collate_fn=list))
    return [next(loader) for _ in range(batches)]


def rows_of(items: list) -> list:
    return [row for _, _, (rows, _) in items for row in rows]


def lines(folder, *sizes: int):
    """JSONL shards of these numbers of rows, numbered through."""
    number = 0
    for shard, size in enumerate(sizes):
        text = "".join(json.dumps(talk(number + i)) + "\n" for i in range(size))
        (folder / f"part-{shard:03}.jsonl").write_text(text)
        number += size
    return open_shards(folder / "part-*.jsonl")


# ------------------------------------------------------------------ formats


def write_tar(path, records: list[dict], pictures) -> None:
    with tarfile.open(path, "w") as archive:
        for record in records:
            parts = {"json": json.dumps(record).encode()}
            if "image" in record:
                parts |= {"jpg": (pictures / record["image"]).read_bytes()}
            for ending, content in parts.items():
                member = tarfile.TarInfo(f"data/{record['id']}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_parquet(path, records: list[dict], pictures) -> None:
    rows = [
        {
            "id": record["id"],
            "images": [{"bytes": (pictures / record["image"]).read_bytes(), "path": None}] if "image" in record else [],
            "messages": [{"role": turn["from"], "content": turn["value"]} for turn in record["conversations"]],
        }
        for record in records
    ]
    texts = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
    features = {"id": datasets.Value("string"), "images": datasets.List(datasets.Image()), "messages": texts}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(path)


def write_json(path, records: list[dict], pictures) -> None:
    text = json.dumps(records) if ".jsonl" not in path.name else "\n".join(map(json.dumps, records))
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


FORMATS = {
    "json": write_json,
    "jsonl": write_json,
    "jsonl.gz": write_json,
    "tar": write_tar,
    "parquet": write_parquet,
}


@pytest.fixture
def shards_of(tmp_path, photo_folder):
    """Two shards of four rows in a format; every other row has an image, of its own kind of entry."""

    def write(ending: str):
        pictures = ("astronaut.jpg", "coffee.jpg")
        for shard in range(2):
            records = [talk(4 * shard + i, pictures[shard] if i % 2 else None) for i in range(4)]
            FORMATS[ending](tmp_path / f"part-{shard:02}.{ending}", records, photo_folder)
        return tmp_path

    return write


def look(row: dict) -> tuple:
    answers = [turns[-1] for turns in row["conversations"]]
    return row["id"], answers[0]["content"], answers[0]["role"], [open_image(image).size for image in row["images"]]


EXPECTED = sorted((f"r{i}", f"n{i}", "assistant", [(96, 64)] if i % 2 else []) for i in range(8))


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_same_rows(ending, shards_of, photo_folder):
    folder = shards_of(ending)
    for source in (folder, folder / f"part-*.{ending}", folder / f"part-{{00..01}}.{ending}"):
        shards = open_shards(source)
        assert len(shards) == 2
        found = take(ChatStream(shards, Names(look=look), 4, photo_folder), 2)
        assert sorted(rows_of(found)) == EXPECTED


@pytest.mark.parametrize("ending", ["jsonl", "tar", "parquet"])
def test_shards_are_read_from_afar(ending, shards_of, photo_folder):
    folder = shards_of(ending)
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, message, *values) -> None:
            asked.append(str(values[0]))

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        shards = open_shards(f"http://127.0.0.1:{server.server_port}/part-{{00..01}}.{ending}")
        found = take(ChatStream(shards, Names(look=look), 4, photo_folder, sharing=Sharing(slots=2)), 2, workers=2)
    finally:
        server.shutdown()
    assert sorted(rows_of(found)) == EXPECTED
    assert any(f"part-01.{ending}" in request for request in asked)


def test_a_hub_name_is_streamed(monkeypatch, shards_of, photo_folder):
    folder, asked = shards_of("parquet"), {}
    load = datasets.load_dataset

    def load_dataset(**arguments):
        asked.update(arguments)
        return load("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    shards = open_shards("someone/some-data", "test")
    assert asked == {"path": "someone/some-data", "split": "test", "streaming": True}
    assert len(shards) == 2
    for workers in (0, 2):
        source = ChatStream(shards, Names(look=look), 4, photo_folder, sharing=Sharing(slots=max(1, workers)))
        assert sorted(rows_of(take(source, 2, workers))) == EXPECTED


# ------------------------------------------------------------------ sharing out


def one_pass(shards: Shards, sharing: Sharing, slot: int, **options) -> list:
    """Rows of the first pass of a part."""
    source = ChatStream(shards, Names(), 1, sharing=sharing, **options)
    source.first, rows = slot, []
    for _, place, (found, _) in source:
        if place["epoch"] > 0:
            return rows
        rows += found
    raise AssertionError("a stream has no end")


@pytest.mark.parametrize("sizes", [(7,), (5, 4, 6), (3, 3, 3, 3), (4, 1, 2, 9, 3, 2, 6)])
@pytest.mark.parametrize(("ranks", "slots"), [(1, 1), (3, 1), (2, 2)])
def test_parts_share_a_pass_without_overlap_or_loss(sizes, ranks, slots, tmp_path):
    shards = lines(tmp_path, *sizes)
    parts = [one_pass(shards, Sharing(rank, ranks, slots), slot) for rank in range(ranks) for slot in range(slots)]
    rows = sum(parts, [])
    assert len(rows) == sum(sizes)
    assert set(rows) == {f"r{i}" for i in range(sum(sizes))}
    assert rows != sorted(rows, key=lambda row: int(row[1:]))


def test_a_shard_is_read_by_one_part_where_that_can_be(tmp_path):
    shards = lines(tmp_path, 2, 2, 2, 2, 2)
    parts = [one_pass(shards, Sharing(rank, 2), 0) for rank in range(2)]
    whole = [sum({f"r{2 * i}", f"r{2 * i + 1}"} <= set(part) for i in range(5)) for part in parts]
    assert whole == [2, 2]  # the fifth is shared row by row
    assert list(map(len, parts)) == [5, 5]


def test_the_order_depends_on_seed_and_pass(tmp_path):
    shards = lines(tmp_path, 10, 10)

    def order(**options) -> list:
        return rows_of(take(ChatStream(shards, Names(), 4, **options), 10))

    first = order(seed=1)
    assert first == order(seed=1)
    assert set(first[:20]) == set(first[20:])
    assert len({tuple(first[:20]), tuple(first[20:]), tuple(order(seed=2)[:20])}) == 3
    in_turn = [f"r{i}" for i in range(20)]
    assert order(shuffle_buffer=1) == in_turn * 2
    blocks = order(shuffle_buffer=5)[:20]
    halves = [{int(row[1:]) // 10 for row in blocks[at : at + 10]} for at in (0, 10)]
    assert sorted(map(len, halves)) == [1, 1]  # a block does not reach into the next shard but one


def test_buckets_have_rows_of_similar_length_in_every_rank_at_the_same_step(tmp_path):
    for rank in range(2):
        records = [talk(40 * rank + i) for i in range(40)]
        for i, record in enumerate(records):
            record["conversations"][1]["value"] = "x" * (1 + (17 * i) % 40)
        write_json(tmp_path / f"part-{rank}.jsonl", records, None)
    shards = open_shards(tmp_path)

    def lengths(rank: int, bucket: int) -> list[list[int]]:
        collator = Names(look=lambda row: len(row["conversations"][0][1]["content"]))
        items = take(ChatStream(shards, collator, 4, bucket=bucket, sharing=Sharing(rank, 2)), 10)
        return [rows for _, _, (rows, _) in items]

    ours, theirs = lengths(0, 10), lengths(1, 10)
    assert all(max(batch) - min(batch) == 3 for batch in ours)
    assert sorted(sum(ours, [])) == list(range(1, 41))
    assert [max(batch) for batch in ours] == [max(batch) for batch in theirs]
    assert [max(batch) for batch in ours] != sorted(max(batch) for batch in ours)
    plain = lengths(0, 0)
    assert sum(max(batch) - min(batch) for batch in plain) > 10 * 3 * 3


# ------------------------------------------------------------------ places


@pytest.mark.parametrize("options", [{}, {"bucket": 2}, {"shuffle_buffer": 1}], ids=str)
@pytest.mark.parametrize("slots", [1, 2])
def test_a_stream_goes_on_at_every_batch(options, slots, tmp_path):
    shards = lines(tmp_path, 9, 7, 8)
    (tmp_path / "part-001.jsonl").write_text((tmp_path / "part-001.jsonl").read_text() + "{broken\n")

    def make() -> ChatStream:
        settings = {"shuffle_buffer": 6} | options
        return ChatStream(shards, Names(bad=("r3", "r20")), 2, seed=4, sharing=Sharing(1, 2, slots), **settings)

    whole = take(make(), 24, slots if slots > 1 else 0)
    assert max(place["epoch"] for _, place, _ in whole) > 0
    assert "part-001.jsonl:7" in {row_id for _, _, (_, bad) in whole for row_id in bad}
    for stop in (1, 5, 8, 13, 17):
        source = make()
        source.places = [dict(START) for _ in range(slots)]
        for slot, place, _ in whole[:stop]:
            source.places[slot] = place
        source.first = stop % slots
        rest = take(source, 24 - stop, slots if slots > 1 else 0)
        assert [(slot, rows) for slot, _, (rows, _) in whole[stop:]] == [(slot, rows) for slot, _, (rows, _) in rest]


def test_going_on_opens_neither_pictures_nor_finished_shards(tmp_path, monkeypatch):
    shards = lines(tmp_path, 50, 50, 50)
    collator, opened = Names(), []
    whole = take(ChatStream(shards, collator, 5, shuffle_buffer=10), 25)
    read = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, index: opened.append(index) or read(self, index))
    monkeypatch.setattr(collator, "encode", lambda row, index: seen.append(row["id"]) or row["id"])
    seen: list[str] = []
    source = ChatStream(shards, collator, 5, shuffle_buffer=10)
    source.places = [whole[22][1]]
    assert rows_of(take(source, 2)) == rows_of(whole[23:])
    assert len(opened) == 1
    assert seen == rows_of(whole[23:])


# ------------------------------------------------------------------ what goes wrong


def broken_shard(folder, ending: str, photo_folder) -> None:
    """The second of three shards is cut in the middle, in the third image if it is an archive."""
    for shard in range(3):
        records = [talk(10 * shard + i, "astronaut.jpg") for i in range(4)]
        FORMATS[ending](folder / f"part-{shard}.{ending}", records, photo_folder)
    path = folder / f"part-1.{ending}"
    at = path.stat().st_size // 2
    if ending == "tar":
        with tarfile.open(path) as archive:
            at = archive.getmember("data/r12.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:at])


@pytest.mark.parametrize("ending", ["json", "jsonl.gz", "tar", "parquet"])
def test_a_broken_shard_costs_itself_only(ending, tmp_path, photo_folder):
    broken_shard(tmp_path, ending, photo_folder)
    source = ChatStream(open_shards(tmp_path), Names(), 1, photo_folder)
    found = take(source, 30)
    rows = rows_of(found)
    assert {f"r{i}" for i in (0, 1, 2, 3, 20, 21, 22, 23)} <= set(rows)
    assert "r13" not in rows
    assert f"part-1.{ending}" in {row_id for _, _, (_, bad) in found for row_id in bad}
    strict = ChatStream(open_shards(tmp_path), Names(), 1, photo_folder, on_bad_row="raise")
    message = rf"^Row part-1.{ending} is broken: unreadable shard: [^\n]*set on_bad_row to 'skip'.$"
    with pytest.raises(ValueError, match=message):
        take(strict, 30)


def test_a_shard_that_vanishes_is_counted(tmp_path):
    shards = lines(tmp_path, 3, 3, 3)
    (tmp_path / "part-001.jsonl").unlink()
    found = take(ChatStream(shards, Names(), 1), 12)
    assert {f"r{i}" for i in (0, 1, 2, 6, 7, 8)} == set(rows_of(found))
    assert {row_id for _, _, (_, bad) in found for row_id in bad} == {"part-001.jsonl"}


def test_bad_rows_are_left_out_and_named(tmp_path, photo_folder):
    records = [talk(i, "coffee.jpg") for i in range(6)]
    records[1]["conversations"].pop()
    records[2]["image"] = "gone.jpg"
    records[3] = {"id": "r3", "text": "no conversation"}
    write_json(tmp_path / "a.jsonl", records, None)
    reasons: dict[str, str] = {}

    class Reasons(Names):
        def pad(self, samples):
            reasons.update((row_id, bad.reason) for _, missed in samples for row_id, bad in missed)
            return super().pad(samples)

    found = take(ChatStream(open_shards(tmp_path / "a.jsonl"), Reasons(look=look), 2, photo_folder), 3)
    assert {row[0] for row in rows_of(found)} == {"r0", "r4", "r5"}
    assert [len(rows) for _, _, (rows, _) in found] == [2, 2, 2]
    assert reasons == {"r1": "no assistant turn", "r2": "missing image", "r3": "no conversation"}
    for workers in (0, 1):
        strict = ChatStream(open_shards(tmp_path / "a.jsonl"), Names(), 2, photo_folder, on_bad_row="raise")
        with pytest.raises(ValueError, match="Row r1 is broken: no assistant turn"):
            take(strict, 1, workers)


def test_it_gives_up_on_nothing_but_bad_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "GIVE_UP_AFTER", 50)
    shards = lines(tmp_path, 7)
    everything = Names(bad=tuple(f"r{i}" for i in range(7)))
    text = r"^50 consecutive rows of [^\n]* are unusable; the last: corrupt image: [^\n]*$"
    with pytest.raises(ValueError, match=text):
        take(ChatStream(shards, everything, 2), 1)
    assert len(rows_of(take(ChatStream(shards, Names(bad=everything.bad[1:]), 2), 4))) == 8


def test_errors_are_one_line(tmp_path, photo_folder):
    shards = lines(tmp_path, 2)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.jsonl").write_text('{"text": "hello", "label": 1}\n')
    (tmp_path / "torn.json").write_text('[{"id": 1, "conv')
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bare").mkdir()
    cases = [
        (FileNotFoundError, "No file or folder .*gone.jsonl", tmp_path / "gone.jsonl"),
        (
            FileNotFoundError,
            r"No file or folder .*part-001.jsonl; it is one of the 3 files of",
            tmp_path / "part-{000..002}.jsonl",
        ),
        (FileNotFoundError, "No files", tmp_path / "gone-*.jsonl"),
        (FileNotFoundError, "No file or folder", tmp_path / "gone"),
        (ValueError, "holds no rows in 1 shards", tmp_path / "empty.jsonl"),
        (ValueError, "holds no rows", tmp_path / "list.json"),
        (ValueError, "holds no rows in 1 shards.* is not valid JSON near", tmp_path / "torn.json"),
        (ValueError, "has the columns text, label; chat data needs", tmp_path / "other.jsonl"),
        (ValueError, "Cannot read .*notes.txt: supported are .json", tmp_path / "notes.txt"),
        (ValueError, "holds no .json, .jsonl, .csv", tmp_path / "bare"),
        (ValueError, "holds files of the formats .json, .jsonl", tmp_path),
    ]
    for kind, text, source in cases:
        with pytest.raises(kind, match=text) as caught:
            open_shards(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"^No image folder [^\n]*$"):
        ChatStream(shards, Names(), 2, tmp_path / "gone")
    with pytest.raises(ValueError, match="'skip' or 'raise', got 'ignore'"):
        ChatStream(shards, Names(), 2, on_bad_row="ignore")
    lonely = ChatStream(shards, Names(), 2, sharing=Sharing(2, 3))
    with pytest.raises(ValueError, match=r"^[^\n]* has no rows for part 3 of 3; use fewer workers or ranks.$"):
        take(lonely, 1)
