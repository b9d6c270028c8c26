"""Records of all known layouts, with the row that each becomes or the reason why it is none.

An image is named by the file that it is; `IMAGES` says which of its sources stand for which file.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

from PIL import Image

from tpcompress.data.shards import open_shards
from tpcompress.data.stream import ChatStream


class Rows:
    """A collator that returns rows and bad rows unchanged."""

    def encode(self, row: dict, index: int) -> dict:
        return row

    def pad(self, samples: list) -> tuple[list[dict], list]:
        return [row for row, _ in samples], [bad for _, missed in samples for bad in missed]


def streamed(source: Path, number: int, **options) -> tuple[dict[str, dict], dict[str, str]]:
    """The first rows of a stream and the bad rows before them, by id."""
    stream = ChatStream(open_shards(source, **options), Rows(), number, shuffle_buffer=1)
    _, _, (rows, bad) = next(iter(stream))
    return {row["id"]: row for row in rows}, {row_id: str(problem) for row_id, problem in bad}


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (level, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


LEVELS = {"a.png": 40, "b.png": 80}
FILES = {name: png(level) for name, level in LEVELS.items()}
A64, B64 = (base64.b64encode(content).decode() for content in FILES.values())
Q, R = "which ?", "red"


def ask(content="which ?", answer="red", user="user", assistant="assistant", **keys) -> dict:
    return {"messages": [{"role": user, "content": content}, {"role": assistant, "content": answer}]} | keys


def llava(content="<image>\nwhich ?", answer="red", **keys) -> dict:
    return {"conversations": [{"from": "human", "value": content}, {"from": "gpt", "value": answer}]} | keys


def parts(*media: dict) -> list[dict]:
    return [*media, {"type": "text", "text": Q}]


def talk(*turns: tuple[str, str]) -> list[list[dict]]:
    return [[{"role": role, "content": content} for role, content in turns]]


ONE = talk(("user", Q), ("assistant", R))
MARKED = talk(("user", f"<image>\n{Q}"), ("assistant", R))
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "left"}}}
CALLING = [
    [
        {"role": "user", "content": Q},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "tool", "content": "dark"},
        {"role": "assistant", "content": R},
    ]
]

GOOD: dict[str, tuple[dict, list, list[str]]] = {
    "plain": (ask(), ONE, []),
    "llava": (llava(image="a.png"), MARKED, ["a.png"]),
    "no marker": (llava(Q, image="a.png"), ONE, ["a.png"]),
    "two images": (
        llava("<image><image> which ?", images=["a.png", "b.png"]),
        talk(("user", "<image><image> which ?"), ("assistant", R)),
        ["a.png", "b.png"],
    ),
    "image null": (ask(image=None), ONE, []),
    "image empty": (ask(image=""), ONE, []),
    "images [null]": (ask(images=[None]), ONE, []),
    "images ['']": (ask(images=[""]), ONE, []),
    "image_path": (ask(image_path="a.png"), ONE, ["a.png"]),
    "img": (ask(img="a.png"), ONE, ["a.png"]),
    "file_name": (ask(file_name="a.png"), ONE, ["a.png"]),
    "image and its path": (ask(image="a.png", image_path="somewhere/a.png"), ONE, ["a.png"]),
    "image and images": (ask(image="a.png", images=["a.png"]), ONE, ["a.png"]),
    "dict of a path": (ask(image={"path": "a.png"}), ONE, ["a.png"]),
    "dict of null bytes": (ask(images=[{"bytes": None, "path": "a.png"}]), ONE, ["a.png"]),
    "base64": (ask(image=A64), ONE, ["a.png"]),
    "data URL": (ask(image=f"data:image/png;base64,{A64}"), ONE, ["a.png"]),
    "part image_url": (ask(parts({"type": "image_url", "image_url": {"url": "a.png"}})), MARKED, ["a.png"]),
    "part image_url as text": (ask(parts({"type": "image_url", "image_url": "a.png"})), MARKED, ["a.png"]),
    "part image_url with data": (
        ask(parts({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{B64}"}})), MARKED, ["b.png"],
    ),
    "part input_image": (
        ask([{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": Q}]), MARKED, ["a.png"],
    ),
    "part image": (ask(parts({"type": "image", "image": "a.png"})), MARKED, ["a.png"]),
    "part image, path": (ask(parts({"type": "image", "path": "a.png"})), MARKED, ["a.png"]),
    "part image, url": (ask(parts({"type": "image", "url": "a.png"})), MARKED, ["a.png"]),
    "part image, base64": (ask(parts({"type": "image", "base64": A64})), MARKED, ["a.png"]),
    "part image, source": (
        ask(parts({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": A64}})),
        MARKED, ["a.png"],
    ),
    "part image without type": (ask([{"image": "a.png"}, {"text": Q}]), MARKED, ["a.png"]),
    "parts with null keys": (
        ask([{"type": "image", "text": None, "index": 0}, {"type": "text", "text": Q, "index": None}], image="a.png"),
        MARKED, ["a.png"],
    ),
    "parts by index": (
        ask(parts({"type": "image", "index": 1}, {"type": "image", "index": 0}), images=["a.png", "b.png"]),
        talk(("user", f"<image><image>\n{Q}"), ("assistant", R)), ["b.png", "a.png"],
    ),
    "parts of a column and their own": (
        ask(parts({"type": "image"}, {"type": "image", "image": "b.png"}), images=["a.png"]),
        talk(("user", f"<image><image>\n{Q}"), ("assistant", R)), ["a.png", "b.png"],
    ),
    "text before the image": (
        ask([{"type": "text", "text": "See"}, {"type": "image", "image": "a.png"}, {"type": "text", "text": " . So"}]),
        talk(("user", "See\n<image> . So"), ("assistant", R)), ["a.png"],
    ),
    "images of a turn": (
        {"messages": [{"role": "user", "content": Q, "images": ["a.png"]}, {"role": "assistant", "content": R}]},
        MARKED, ["a.png"],
    ),
    "image in a later turn": (
        {"messages": [*ask()["messages"], *ask(parts({"type": "image", "image": "a.png"}))["messages"]]},
        talk(("user", Q), ("assistant", R), ("user", f"<image>\n{Q}"), ("assistant", R)), ["a.png"],
    ),
    "roles User and model": (ask(user="User", assistant="model"), ONE, []),
    "roles human and gpt": (ask(user="human", assistant="gpt"), ONE, []),
    "role developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *ask()["messages"]]},
        talk(("system", "Be brief."), *((t["role"], t["content"]) for t in ONE[0])), [],
    ),
    "system column": (
        ask(system="Be brief."), talk(("system", "Be brief."), ("user", Q), ("assistant", R)), [],
    ),
    "query and response": ({"query": Q, "response": R}, ONE, []),
    "history": (
        {"query": Q, "response": R, "history": [["a ?", "b"]]},
        talk(("user", "a ?"), ("assistant", "b"), ("user", Q), ("assistant", R)), [],
    ),
    "prompt and completion": ({"prompt": f"<image>\n{Q}", "completion": R, "images": ["a.png"]}, MARKED, ["a.png"]),
    "prompt and completion as messages": (
        {"prompt": ask()["messages"][:1], "completion": ask()["messages"][1:]}, ONE, [],
    ),
    "question and answer": ({"question": Q, "answer": R, "image": "a.png"}, ONE, ["a.png"]),
    "instruction": ({"instruction": Q, "input": "", "output": R}, ONE, []),
    "instruction and input": (
        {"instruction": "which", "input": "?", "output": R}, talk(("user", "which\n?"), ("assistant", R)), [],
    ),
    "texts": ({"images": ["a.png"], "texts": [{"user": Q, "assistant": R, "source": "x"}]}, ONE, ["a.png"]),
    "messages as JSON": ({"messages": json.dumps(ask()["messages"])}, ONE, []),
    "dict of lists": ({"conversations": {"from": ["human", "gpt"], "value": [Q, R]}}, ONE, []),
    "a number": (ask(answer=3), talk(("user", Q), ("assistant", "3")), []),
    "a fraction": (ask(answer=0.5), talk(("user", Q), ("assistant", "0.5")), []),
    "a truth value": (ask(answer=True), talk(("user", Q), ("assistant", "true")), []),
    "messages null beside conversations": (llava(Q) | {"messages": None}, ONE, []),
    "several conversations": (
        {"conversations": [ask()["messages"], ask("a ?", "b")["messages"]], "families": ["x", "y"]},
        ONE + talk(("user", "a ?"), ("assistant", "b")), [],
    ),
    "tool calls": (
        {"messages": [
            {"role": "user", "content": Q}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "dark"}, {"role": "assistant", "content": R},
        ], "tools": TOOLS}, CALLING, [],
    ),
    "ShareGPT's function_call": (
        {"conversations": [
            {"from": "human", "value": Q}, {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "dark"}, {"from": "gpt", "value": R},
        ], "tools": json.dumps(TOOLS)}, CALLING, [],
    ),
    "emoji and NUL": (ask("\U0001f600 苹果", "a\0b"), talk(("user", "\U0001f600 苹果"), ("assistant", "a\0b")), []),
    "columns of no interest": (ask(source="web", image_id=7, width=3, url="https://example.com/x"), ONE, []),
}  # fmt: skip

BAD: dict[str, tuple[dict, str]] = {
    "marker without image": (llava(), "image markers: 1 for 0 images"),
    "two markers": (llava("<image> <image> ?", image="a.png"), "image markers: 2 for 1 images"),
    "two images, one marker": (llava(images=["a.png", "b.png"]), "image markers: 1 for 2 images"),
    "empty answer": (ask(answer=""), "empty content"),
    "null answer": (ask(answer=None), "empty content"),
    "consecutive users": ({"messages": [ask()["messages"][0], *ask()["messages"]]}, "role order"),
    "ends with user": ({"messages": [*ask()["messages"], ask()["messages"][0]]}, "role order"),
    "starts with assistant": ({"messages": ask()["messages"][1:]}, "role order"),
    "unknown role": (ask(user="wizard"), "unknown role: \"'wizard'\"|unknown role: 'wizard'"),
    "no role": ({"messages": [{"content": Q}, {"content": R}]}, "turn without a role: it has content"),
    "turns of text": ({"messages": [Q, R]}, "unknown turn: which [?] .str."),
    "image in an answer": (ask(answer="<image>"), "image marker in an answer"),
    "no conversation": ({"text": "hello"}, "no conversation: the record has text"),
    "chosen and rejected": ({"chosen": [], "rejected": []}, "no conversation: the record has chosen, rejected"),
    "messages null": ({"messages": None}, "no assistant turn"),
    "messages as text": ({"messages": "hello"}, "broken messages: the text is not JSON: hello"),
    "image is a number": (ask(image=7), "not an image: 7 .int."),
    "image is a truth value": (ask(image=True), "not an image: True .bool."),
    "image is remote": (ask(image="https://example.com/a.png"), "remote image: https addresses are not read"),
    "part is remote": (
        ask(parts({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}})), "remote image: https",
    ),
    "part with file_id": (ask(parts({"type": "input_image", "file_id": "f-1"})), "remote image: a file_id"),
    "part of audio": (ask(parts({"type": "input_audio", "input_audio": {"data": "x"}})), "unread media: .*input_audio"),
    "unknown part": (ask(parts({"type": "refusal", "refusal": "no"})), "unknown part: refusal"),
    "image part without source": (ask(parts({"type": "image"})), "image markers: 1 for 0 images"),
    "video marker without video": (ask("<video> ?"), "video markers: 1 for 0 videos"),
    "unknown column of an image": (ask(thumbnail=f"data:image/png;base64,{A64}"), "unread media: column 'thumbnail'"),
    "unknown column of a file": (ask(photo_name="a.png"), "unread media: column 'photo_name' .*file name a.png"),
    "audio": (ask(audio="a.wav"), "unread media: column 'audio'"),
    "two columns": (ask(image="a.png", images=["b.png"]), "two columns of media: images and image differ"),
    "column beside parts": (
        ask(parts({"type": "image", "image": "a.png"}), images=["b.png"]), "image markers: 1 of the 1 images .* none",
    ),
    "two system prompts": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, *ask()["messages"]]}, "two system prompts",
    ),
    "broken tools": (ask(tools="look"), "broken tools"),
    "tools without an answer": ({"messages": [ask()["messages"][0], {"role": "tool", "content": "x"}]}, "no assistant"),
    "lone surrogate": (ask("\ud83d ?"), "lone surrogate: "),
    "lone surrogate in a path": (ask(image="\ud83d.png"), "lone surrogate: "),
    "wrong number of families": (ask(families=["a", "b"]), "families: 2 for 1 conversations"),
    "broken base64": (ask(image={"base64": "???"}), "broken base64"),
}  # fmt: skip
