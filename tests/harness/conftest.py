"""Questions with images, and models in the stub of lmms-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness.lmms_eval import stub

from tpcompress.evaluation.tasks import create_task
from tpcompress.harness.lmms_eval import model as classes

PLAN = "divprune:16"


@pytest.fixture(scope="session")
def docs() -> list[dict[str, Any]]:
    """Six questions: images of two sizes, and one question without an image."""
    rows = create_task({"type": "benchmark", "num_images": 3, "seed": 0}).rows
    found = []
    for number in range(6):
        row = rows[number // 2]
        asked, answered = row["conversations"][number % 2]
        image = row["images"][0]
        image = image.resize((160, 120)) if number == 3 else image
        question = asked["content"].replace("<image>", "").strip()
        found.append({"images": [image], "question": question, "answer": answered["content"]})
    found[4]["images"] = []
    return found


@pytest.fixture(scope="module")
def logged() -> Iterator[list[dict[str, Any]]]:
    """lmms-eval replaced by the stub; the throughput metrics that models log."""
    with pytest.MonkeyPatch.context() as patch:
        classes._made.cache_clear()
        yield stub.install(patch)
        classes._made.cache_clear()


@pytest.fixture(scope="module")
def loaded(logged: list[dict[str, Any]], docs: list[dict[str, Any]]) -> Callable[..., Any]:
    """A function that loads a model of lmms-eval with the questions as its task `shapes`; equal calls share it."""
    made: dict[Any, Any] = {}

    def load(name: str = "TpcompressChat", **arguments: Any) -> Any:
        key = (name, tuple(sorted(arguments.items())))
        if key not in made:
            made[key] = getattr(classes, name)(**{"pretrained": "tiny_llava", "device": "cpu"} | arguments)
            made[key].task_dict = {"shapes": {"test": docs}}
        return made[key]

    return load
