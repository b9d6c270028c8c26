"""A task of lmms-eval on this machine: questions about bundled images, as parquet file, YAML and functions."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import datasets

from tpcompress.evaluation.tasks import create_task

TASK = "tpcompress_shapes"
ROWS = 12

YAML = """\
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.to_visual
doc_to_text: !function utils.to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false, num_beams: 1, top_p: 1.0}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
metadata: {{version: 1.0}}
"""

FUNCTIONS = """\
from io import BytesIO

from PIL import Image


def to_visual(doc):
    return [Image.open(BytesIO(one)).convert("RGB") for one in doc["images"]]


def to_text(doc):
    return doc["question"]
"""


def questions(number: int = ROWS) -> list[dict[str, Any]]:
    """Questions with their images as PNG: mixed sizes, one question without an image, one with two."""
    rows, found = create_task({"type": "benchmark", "num_images": number, "seed": 0}).rows, []
    for index in range(number):
        row = rows[index]
        asked, answered = row["conversations"][index % len(row["conversations"])]
        images = [row["images"][0].convert("RGB")]
        if index % 3 == 1:
            images = [images[0].resize((150, 110))]
        if index == 4:
            images = []
        if index == 7:
            images.append(rows[0]["images"][0].convert("RGB"))
        question = asked["content"].replace("<image>", "").strip()
        found.append({"question": question, "answer": answered["content"], "images": [_png(one) for one in images]})
    return found


def write(folder: Path) -> Path:
    """Write the task into a folder, for `--include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "shapes.parquet"
    datasets.Dataset.from_list(questions()).to_parquet(str(data))
    (folder / f"{TASK}.yaml").write_text(YAML.format(task=TASK, data=data))
    (folder / "utils.py").write_text(FUNCTIONS)
    return folder


def _png(image: Any) -> bytes:
    file = BytesIO()
    image.save(file, "png")
    return file.getvalue()
