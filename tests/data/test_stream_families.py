"""A stream names the families of questions as `load_chat` does."""

from __future__ import annotations

import json

from tpcompress.data.chat import load_chat
from tpcompress.data.shards import open_shards
from tpcompress.data.stream import ChatStream


class Rows:
    """A collator that returns rows unchanged."""

    def encode(self, row: dict, index: int) -> dict:
        return row

    def pad(self, samples: list) -> list[dict]:
        return [row for row, _ in samples]


def test_families_of_a_stream_are_those_of_the_loaded_data(tmp_path):
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]
    named: list[dict] = [{"family": "ocr"}, {"families": ["chart"]}, {}]
    records = [{"id": str(i), "conversations": turns} | more for i, more in enumerate(named)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    loaded, _ = load_chat(path, cache_dir=tmp_path / "cache")
    _, _, streamed = next(iter(ChatStream(open_shards(path), Rows(), 3, shuffle_buffer=1)))
    assert [row["families"] for row in streamed] == [["ocr"], ["chart"], ["chat"]]
    assert [row["families"] for row in loaded] == [["ocr"], ["chart"], ["chat"]]
