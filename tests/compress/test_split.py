"""The three parts of the data: disjoint by image, the same for a seed, with images from inside the data beside them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from tpcompress.compress.settings import CompressSettings
from tpcompress.compress.split import PARTS, split_data
from tpcompress.data import load_chat


def save_rows(folder: Path, images: list[str]) -> str:
    for number, name in enumerate(sorted({name for name in images if name})):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "that"}]
    records = [{"id": i, "conversations": turns} | ({"image": name} if name else {}) for i, name in enumerate(images)]
    (folder / "rows.json").write_text(json.dumps(records))
    return str(folder / "rows.json")


def parts(folder: Path) -> dict[str, list[dict]]:
    texts = {part: (folder / f"{part}.jsonl").read_text().splitlines() for part in PARTS}
    return {part: [json.loads(line) for line in text] for part, text in texts.items()}


def test_rows_of_one_image_stay_together(tmp_path: Path) -> None:
    source = save_rows(tmp_path, [f"{i // 3}.png" for i in range(60)] + [""] * 4)
    split = split_data(source, tmp_path / "a")
    found = parts(tmp_path / "a")
    assert {part: len(rows) for part, rows in found.items()} == split.rows
    assert sorted(int(row["id"]) for rows in found.values() for row in rows) == list(range(64))
    images = [{image for row in rows for image in row["images"]} for rows in found.values()]
    assert sum(map(len, images)) == len(set.union(*images)) == 20
    assert 8 <= split.rows["table"] <= 10
    assert str(split) == f"{split.rows['train']} rows to train on, {split.rows['choose']} to choose on, " + (
        f"{split.rows['table']} for the table"
    )
    split_data(source, tmp_path / "b")
    split_data(source, tmp_path / "c", seed=1)
    assert parts(tmp_path / "b") == found
    assert parts(tmp_path / "c") != found
    rows, report = load_chat(split.file("table"))
    assert len(rows) == split.rows["table"]
    assert not len(report)


def test_a_split_is_made_once(tmp_path: Path) -> None:
    source = save_rows(tmp_path, [f"{i}.png" for i in range(10)])
    first = split_data(source, tmp_path / "a")
    Path(source).unlink()
    assert split_data(source, tmp_path / "a") == first
    assert first.rows == {"train": 6, "choose": 2, "table": 2}


def test_images_inside_the_data_are_written_once(tmp_path: Path) -> None:
    def encoded(shade: int) -> dict:
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    messages = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "that"}]
    table = datasets.Dataset.from_dict(
        {"images": [[encoded(i // 2)] for i in range(20)], "messages": [messages] * 20},
        features=datasets.Features(
            {
                "images": datasets.List(datasets.Image()),
                "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            }
        ),
    )
    table.to_parquet(tmp_path / "rows.parquet")
    split_data(str(tmp_path / "rows.parquet"), tmp_path / "a")
    assert len(list((tmp_path / "a/images").iterdir())) == 10
    for rows in parts(tmp_path / "a").values():
        for row in rows:
            shade = int(row["id"]) // 2
            assert Image.open(row["images"][0]).convert("RGB").getpixel((0, 0)) == (shade, shade, shade)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([f"{i}.png" for i in range(7)], "has usable rows with 7 different images; compress needs 8."),
        (["same.png"] * 60 + [f"{i}.png" for i in range(7)], None),
    ],
)
def test_too_few_images(images: list[str], message: str | None, tmp_path: Path) -> None:
    source = save_rows(tmp_path, images)
    if message is None:
        split_data(source, tmp_path / "a")
        assert all(rows for rows in parts(tmp_path / "a").values())
        return
    with pytest.raises(ValueError, match=message):
        split_data(source, tmp_path / "a")


def test_a_file_and_its_bytes_are_one_image(tmp_path: Path) -> None:
    source = save_rows(tmp_path, [f"{i}.png" for i in range(16)])
    (tmp_path / "copy.png").write_bytes((tmp_path / "3.png").read_bytes())
    rows = json.loads(Path(source).read_text())
    rows += [json.loads(json.dumps(rows[3]).replace("3.png", "copy.png"))] * 4
    Path(source).write_text(json.dumps(rows))
    split_data(source, tmp_path / "a")
    names = [{Path(row["images"][0]).name for row in part} for part in parts(tmp_path / "a").values()]
    assert sum(bool(part & {"3.png", "copy.png"}) for part in names) == 1


def test_videos_are_left_out_where_the_model_takes_none(tmp_path: Path) -> None:
    source = save_rows(tmp_path, [f"{i}.png" for i in range(12)])
    rows = json.loads(Path(source).read_text())
    messages = rows[0].get("messages") or rows[0]["conversations"]
    Image.new("RGB", (8, 8)).save(tmp_path / "clip.gif")
    video = {"video": str(tmp_path / "clip.gif"), "messages": json.loads(json.dumps(messages).replace("<image>", ""))}
    Path(source).write_text(json.dumps([*rows, video]))
    split = split_data(source, tmp_path / "a", no_video="it has no video processor")
    assert sum(split.rows.values()) == 12
    assert "no video support" in split.left_out


def test_a_budget_above_all_tokens_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"^--keep 9/1: keep_ratio must be in \(0, 1\], got 9"):
        CompressSettings("tiny_llava", "rows.json", "9/1")
