"""A module whose weights tell the order of its batches, rows that tell their number, and ways to interrupt a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from skimage import data as photos
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + ' :' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s> ' }}{% endif %}{% endfor %}"
)
NUM_ROWS = 11


def make_processor() -> LlavaProcessor:
    """A word per token, four vision tokens per image."""
    words = ["<unk>", "</s>", "<pad>", "<image>", "which", ":", *[f"n{i}" for i in range(NUM_ROWS)]]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<image>"], **names)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )


def records(folder: Path) -> list[dict]:
    """LLaVA records, the i-th with the answer n<i>; every third row is text only, the others' images are written."""
    found = []
    for i in range(NUM_ROWS):
        image = {} if i % 3 == 2 else {"image": f"{i}.jpg"}
        Image.fromarray(photos.astronaut()[8 * i : 8 * i + 64, :64]).save(folder / f"{i}.jpg")
        turns = [{"from": "human", "value": "<image> which" if image else "which"}, {"from": "gpt", "value": f"n{i}"}]
        found.append({"id": i, "conversations": turns} | image)
    return found


def write_chat(folder: Path) -> Path:
    """The records as a LLaVA file."""
    path = folder / "chat.json"
    path.write_text(json.dumps(records(folder)))
    return path


class Toy(LightningModule):
    """Weights that depend on the order of the batches, not only on their set."""

    def __init__(self, processor) -> None:
        super().__init__()
        self.processor = processor
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch, batch_idx):
        meta = batch.pop("meta")
        self.seen.append((batch_idx, meta.rows))
        pixels = batch["pixel_values"].mean() if "pixel_values" in batch else 0.5
        return ((self.weight * (batch["input_ids"].float().mean() + pixels)).sin()).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val", batch["input_ids"].float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Interrupt(Callback):
    """Saves and stops as a user or a scheduler would, at a given batch."""

    def __init__(self, path, when: str, batch: int = 0) -> None:
        self.path, self.when, self.batch, self.count = path, when, batch, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.when == "failing" and self.count == self.batch:
            trainer.save_checkpoint(self.path)
            raise KeyError("interrupted")
        self.count += 1

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.when == "batch" and self.count == self.batch:
            trainer.save_checkpoint(self.path)
            raise KeyError("interrupted")

    def on_train_epoch_end(self, trainer, module) -> None:
        if self.when == "epoch":
            trainer.save_checkpoint(self.path)
            raise KeyError("interrupted")

    def on_validation_end(self, trainer, module) -> None:
        if self.when == "validation" and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            raise KeyError("interrupted")


def trainer_for(tmp_path, *callbacks, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        quiet["enable_checkpointing"] = False
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **quiet | {"max_epochs": 3} | options)
