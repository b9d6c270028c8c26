"""Evaluate the published base on held-out test images and write its model card."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from tiny_base.joint import exact_match
from tpcompress.data.benchmark.builder import make_row
from tpcompress.data.benchmark.vocabulary import FAMILIES

TEST_IMAGES = 1024
FLOORS = {family: 85.0 if family == "digits" else 95.0 for family in FAMILIES}

_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: cc-by-4.0
---

# tiny_llava

A stock `LlavaForConditionalGeneration` of 0.81 M parameters, trained from scratch on procedural 96x96 images with a
closed vocabulary. It is a test bed for the cost of vision-token pruning, within minutes on a CPU, and nothing else.
CLIP tower (3 layers, width 128), two-layer projector, two Llama layers, 144 vision tokens.

Exact match in percent on {images} held-out test images; "blind" is the same model with every image blanked.

| family | dense | blind |
|---|---|---|
{rows}

Built with `{command}` (joint seed {seed}). The handwritten digits are those of the UCI set (E. Alpaydin and C. Kaynak,
CC BY 4.0; see `../DIGITS_LICENSE.txt`). Test digits are unseen samples from the end of the set, which is ordered by
writer.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "how many rings ?"}}]}}]
inputs = processor(images=image, text=processor.apply_chat_template(chat), return_tensors="pt")
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```
"""


def measure(model: LlavaForConditionalGeneration, images: int, console: Console) -> dict[str, tuple[float, float]]:
    """Measure the exact match per family, (dense, blind), and print it as a table."""
    dense = exact_match(model, "test", images)
    blind = exact_match(model, "test", images, blind=True)
    table = Table("family", "dense", "blind", title=f"exact match on {images} held-out images, percent")
    for family in dense:
        table.add_row(family, f"{dense[family]:.1f}", f"{blind[family]:.1f}")
    console.print(table)
    return {family: (dense[family], blind[family]) for family in dense}


def below_floor(measured: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Families below the required accuracy."""
    return {family: dense for family, (dense, _) in measured.items() if dense < FLOORS[family]}


def write_card(folder: Path, measured: dict[str, tuple[float, float]], images: int, command: str, seed: int) -> None:
    """Write the model card."""
    rows = "\n".join(f"| {family} | {dense:.1f} | {blind:.1f} |" for family, (dense, blind) in measured.items())
    card = _CARD.format(images=images, rows=rows, command=command, seed=seed)
    (folder / "README.md").write_text(card, encoding="utf-8")


@torch.no_grad()
def generated_accuracy(folder: Path, images: int = 40) -> float:
    """Percent of questions answered correctly by the published folder with its own processor and `generate`."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    right = []
    for index in range(images):
        row = make_row("test", 1, index)
        for user, assistant in row["conversations"]:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user["content"]}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = processor(images=row["images"], text=text, return_tensors="pt")
            answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
            right.append(processor.decode(answer, skip_special_tokens=True) == assistant["content"])
    return 100 * sum(right) / len(right)
