import json

import datasets
import pytest
from PIL import Image

from tpcompress.data import GoodRows, load_chat
from tpcompress.data.rows import BadRow, open_image

BAD = {  # reason -> (image, turns)
    "missing image": ("gone.jpg", ("<image>\nwhat ?", "a cat")),
    "corrupt image": ("torn.jpg", ("<image>\nwhat ?", "a cat")),
    "no assistant turn": ("astronaut.jpg", ("<image>\nwhat ?",)),
    "role order": ("astronaut.jpg", ("<image>\nwhat ?", "a cat", "and ?")),
    "image markers": ("astronaut.jpg", ("<image> <image>\nwhat ?", "a cat")),
    "image marker in an answer": ("astronaut.jpg", ("<image> what ?", "a <image>")),
    "empty content": ("astronaut.jpg", ("<image>\nwhat ?", " ")),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(photo_folder):
    (photo_folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    return photo_folder


@pytest.fixture
def messages():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what is this ?"}]
    answer = [{"type": "text", "text": "a cat"}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


ROW = [[{"role": "user", "content": "<image>\nwhat is this ?"}, {"role": "assistant", "content": "a cat"}]]


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_llava_files_become_rows(name, llava_json, record, folder, cache):
    several = record(["chelsea.jpg", "camera.png"], "b", ("<image><image> how many ?", "two", "cat ?", "yes"))
    path = llava_json([record(), several, record(None, 7, ("how many ?", "one"))], name)
    rows, report = load_chat(path, folder, cache_dir=cache)
    assert str(report) == "all 3 rows usable"
    assert rows[0]["images"] == [str(folder / "astronaut.jpg")]
    assert rows[0]["conversations"][0][0] == {"role": "user", "content": "<image>\nwhat is this ?"}
    assert [turn["role"] for turn in rows[1]["conversations"][0]] == ["user", "assistant"] * 2
    assert len(rows[1]["images"]) == 2
    assert rows[1]["id"] == "b"
    assert rows[2]["images"] == []
    assert rows[2]["families"] == ["chat"]


def test_a_long_file_is_read_in_pieces(llava_json, record, folder, cache, monkeypatch):
    monkeypatch.setattr("tpcompress.data.formats.READ_CHARS", 97)
    records = [record(row_id=i, turns=("<image> [what] {is}, ]", f"cat \u82f9 {i}")) for i in range(50)]
    rows, _ = load_chat(llava_json(records), folder, cache_dir=cache)
    assert [row["conversations"][0][1]["content"] for row in rows] == [f"cat \u82f9 {i}" for i in range(50)]


def test_an_edited_file_is_read_anew(llava_json, record, folder, cache):
    first, _ = load_chat(llava_json([record()]), folder, cache_dir=cache)
    again, _ = load_chat(llava_json([record(), record()]), folder, cache_dir=cache)
    assert (len(first), len(again)) == (1, 2)


@pytest.mark.parametrize("kind", ["save_to_disk", "splits", "parquet file", "parquet folder"])
@pytest.mark.parametrize("column", ["images", "image", "paths"])
def test_hugging_face_data_becomes_rows(kind, column, messages, folder, tmp_path, cache):
    photo = str(folder / "chelsea.jpg")
    feature = {
        "images": datasets.List(datasets.Image()),
        "image": datasets.Image(),
        "paths": datasets.List(datasets.Value("string")),
    }[column]
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({column.replace("paths", "images"): feature, "messages": datasets.List(turn)})
    image = photo if column == "image" else [photo]
    data = datasets.Dataset.from_list([{column.replace("paths", "images"): image, "messages": messages}] * 3, features)
    target = tmp_path / "data"
    if kind == "save_to_disk":
        data.save_to_disk(target)
    elif kind == "splits":
        datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(target)
    else:
        target.mkdir()
        data.to_parquet(target / "train.parquet")
        target = target / "train.parquet" if kind == "parquet file" else target
    rows, report = load_chat(target, cache_dir=cache)
    assert len(rows) == 3
    assert not len(report)
    assert rows[0]["conversations"] == ROW
    assert open_image(rows[2]["images"][0]).size == (96, 64)


def test_rows_saved_as_rows_are_read_back(folder, tmp_path):
    row = {"images": [str(folder / "chelsea.jpg")], "conversations": ROW + ROW, "families": ["count", "colour"]}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "rows")
    rows, _ = load_chat(tmp_path / "rows")
    assert {name: rows[0][name] for name in row} == row


@pytest.mark.parametrize("reason", BAD)
def test_bad_rows_are_counted_or_fatal(reason, llava_json, record, folder, cache):
    image, turns = BAD[reason]
    path = llava_json([record(row_id="good"), record(image, "rotten", turns), record(row_id="fine")])
    rows, report = load_chat(path, folder, cache_dir=cache)
    assert report.counts == {reason: 1}
    assert report.examples[reason][0].startswith("rotten")
    assert [row["id"] for row in rows] == ["good", "fine"]
    assert "\n" not in str(report)
    with pytest.raises(ValueError, match=f"^Row rotten is broken: {reason}[^\n]*$"):
        load_chat(path, folder, on_bad_row="raise", cache_dir=cache)


def test_unknown_role_and_malformed_records(llava_json, record, folder, cache):
    wizard = {"id": "w", "conversations": [{"from": "wizard", "value": "hello"}, {"from": "gpt", "value": "a"}]}
    shapeless = [{"id": "x", "conversations": None}, {"id": "y", "conversations": ["text"]}, {"id": "z"}]
    rows, report = load_chat(llava_json([record(), wizard, *shapeless]), folder, cache_dir=cache)
    assert report.counts == {"unknown role": 1, "no assistant turn": 1, "unknown turn": 1, "no conversation": 1}
    assert len(rows) == 1


def test_images_that_appear_after_a_first_try_are_found(llava_json, record, folder, cache):
    path = llava_json([record(), record("late.jpg", 1)])
    assert len(load_chat(path, folder, cache_dir=cache)[1]) == 1
    Image.new("RGB", (8, 8)).save(folder / "late.jpg")
    assert len(load_chat(path, folder, cache_dir=cache)[1]) == 0


def test_nothing_is_decoded_beforehand(llava_json, record, folder, cache, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    rows, _ = load_chat(llava_json([record()]), folder, cache_dir=cache)
    rows[0]
    with pytest.raises(pytest.fail.Exception, match="decoded"):
        open_image(rows[0]["images"][0])


def test_damage_behind_the_header_shows_on_use(llava_json, record, folder, cache):
    whole = (folder / "coffee.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    path = llava_json([record("cut.jpg", 0), record("coffee.jpg", 1)])
    rows, report = load_chat(path, folder, cache_dir=cache)
    assert not len(report)

    def encode(row, index):
        return index, open_image(row["images"][0]).size

    sample, passed_over = GoodRows(rows, encode)[0]
    assert sample == (1, (96, 64))
    assert [(row_id, bad.reason) for row_id, bad in passed_over] == [("0", "corrupt image")]
    with pytest.raises(ValueError, match=r"^Row 0 is broken: corrupt image: [^\n]*cut.jpg[^\n]*$"):
        GoodRows(rows, encode, "raise")[0]
    with pytest.raises(ValueError, match="None of the 1 rows"):
        GoodRows(rows.select([0]), encode)[0]


def test_unchecked_images_show_on_use(llava_json, record, folder, cache):
    rows, _ = load_chat(llava_json([record("gone.jpg")]), folder, check_images=False, cache_dir=cache)
    with pytest.raises(BadRow, match="missing image"):
        open_image(rows[0]["images"][0])


def test_errors_are_one_line(llava_json, record, folder, tmp_path, cache):
    good = llava_json([record()])
    (tmp_path / "broken.json").write_text('[{"id": 1, "conversations": [}]')
    (tmp_path / "cut.json").write_text(json.dumps([record()])[:-1])
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text(json.dumps([{"text": "hello"}] * 300))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bare").mkdir()
    datasets.Dataset.from_dict({"text": ["hello"]}).save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "tests")
    silent = llava_json([record(turns=("<image> what ?",))], "silent.json")
    cases = [
        (FileNotFoundError, "No file or folder", (tmp_path / "gone.json", folder)),
        (FileNotFoundError, "No image folder", (good, tmp_path / "gone")),
        (ValueError, "is not valid JSON near", (tmp_path / "broken.json", folder)),
        (ValueError, "is not valid JSON near its end", (tmp_path / "cut.json", folder)),
        (ValueError, "is empty", (tmp_path / "empty.json", folder)),
        (ValueError, "holds no rows", (tmp_path / "list.json", folder)),
        (ValueError, "has the columns text; chat data needs", (tmp_path / "other.json", folder)),
        (ValueError, "supported are .json", (tmp_path / "notes.txt", folder)),
        (ValueError, "holds no .json, .jsonl", (tmp_path / "bare", folder)),
        (ValueError, "has the columns text", (tmp_path / "plain", folder)),
        (ValueError, "has no split 'train'; it has test", (tmp_path / "tests", folder)),
        (ValueError, "No usable row in .*no assistant turn 1", (silent, folder)),
    ]
    for kind, text, arguments in cases:
        with pytest.raises(kind, match=text) as caught:
            load_chat(*arguments, cache_dir=cache)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="must be 'skip' or 'raise', got 'ignore'"):
        load_chat(good, folder, on_bad_row="ignore")


def test_a_hub_name_goes_through_load_dataset(monkeypatch, messages, folder):
    asked = {}

    def load_dataset(**arguments):
        asked.update(arguments)
        return datasets.Dataset.from_list([{"images": [str(folder / "chelsea.jpg")], "messages": messages}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, _ = load_chat("someone/some-data", split="test")
    assert (asked["path"], asked["split"]) == ("someone/some-data", "test")
    assert rows[0]["conversations"] == ROW
