"""Paths that do not exist, and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tpcompress.cli.main import main
from tpcompress.data.formats import READERS
from tpcompress.paths import DATA_SUFFIXES, check_data, near_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photos" / "train").mkdir(parents=True)
    (tmp_path / "photos" / "train" / "rows.json").write_text("[]")
    (tmp_path / "rows.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("rows.json", "rows.jsonl"),
        ("photo/train/rows.json", "photos/train/rows.json"),
        ("photo/trian/rows.json", "photos"),
        ("photos/train/row.json", "photos/train/rows.json"),
        ("./photos/tran", "photos/train"),
        ("quite/different", None),
        ("gone.json", None),
        ("photos", None),
    ],
)
def test_the_nearest_path_is_named(folder: Path, given: str, meant: str | None) -> None:
    assert near_path(given) == ("" if meant is None else f" Did you mean {meant}?")


@pytest.mark.parametrize("source", ["owner/name", "s3://gone/rows.json", "gone*.json", "part-{00..03}.json", "photos"])
def test_what_may_be_no_path_passes(folder: Path, source: str) -> None:
    check_data(source)


def test_every_format_has_its_ending() -> None:
    assert set(READERS) <= set(DATA_SUFFIXES)


def test_commands_name_the_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"model": {"base": "tiny_llava"}, "data": {"class_path": "ChatData", "init_args": {"train": "row.jsonl"}}}
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    hint = "Did you mean rows.jsonl?"
    for args, end in (
        (["compress", "tiny_llava", "row.jsonl"], hint),
        (["fit", "tiny_llava", "row.jsonl", "--plan", "pool:9"], hint),
        (["fit", "--config", "run.yaml"], hint),
        (["fit", "--config", "run.yaml", "--data.train", "rows.json"], hint),
        (["fit", "--config", "run.yaml", "--data.train=rows.jsonl", "--data.image_folder=photo"], "mean photos?"),
        (["evaluate", "./photo", "rows.jsonl"], "mean photos?"),
        (["rank", "tiny_llava", "rows.jsonl", "--image-folder", "photo"], "mean photos?"),
        (["verify", "photo"], "mean photos?"),
        (["evaluate", "photo/last.ckpt", "rows.jsonl"], "mean photos?"),
    ):
        assert main(args) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: No ")
        assert err.rstrip().endswith(end), err
