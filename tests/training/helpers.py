"""What the tests of training share: a tiny model in hub layout, chat data of real photographs, runs and watchers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback
from PIL import Image
from skimage import data as photos
from support import scramble
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tpcompress.insertion.attach import attachment_of
from tpcompress.training.recipe.run import RecipeCLI, run_recipe

NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
SPECIAL = [*NAMES.values(), "<image>"]
TOKENS = 144
"""Vision tokens per image."""
TEMPLATE = (  # that of llava-1.5: images first, answers without an end token
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_processor() -> LlavaProcessor:
    """Llama's kind of tokenizer, CLIP's kind of image processor."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    pieces = SPECIAL + [f"<0x{value:02X}>" for value in range(256)]
    core.train_from_iterator(
        ["USER: what is this ? ASSISTANT: a woman in a space suit, a cat, a cup of coffee, a man with a camera"] * 4,
        trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<image>"], **NAMES)
    images = CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


def save_base(folder: Path) -> Path:
    """A random LLaVA-1.5 of four layers in hub layout."""
    processor = make_processor()
    tokenizer = processor.tokenizer
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 96, "patch_size": 8,
    }  # fmt: skip
    text = {
        "model_type": "llama", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image_id, image_seq_length=TOKENS,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    scramble(AutoModelForImageTextToText.from_config(config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_chat(folder: Path) -> Path:
    """Ten LLaVA records about four photographs; `chat.json` mixes in text, `text.json` has no image at all."""
    (folder / "images").mkdir()
    names = ("astronaut", "chelsea", "coffee", "camera")
    for name in names:
        Image.fromarray(getattr(photos, name)()).convert("RGB").resize((120, 96)).save(folder / f"images/{name}.jpg")
    answers = ("a woman in a space suit", "a cat", "a cup of coffee", "a man with a camera")
    mixed, text = [], []
    for number in range(10):
        answer = answers[number % 4]
        turns = [{"from": "human", "value": "what is this ?"}, {"from": "gpt", "value": answer}]
        text.append({"id": number, "conversations": turns})
        turns = [{"from": "human", "value": "<image>\nwhat is this ?"}, *turns[1:]]
        turns += [{"from": "human", "value": "a cat ?"}, {"from": "gpt", "value": "a cup"}] * (number % 2)
        image = {"image": f"{names[number % 4]}.jpg"}
        mixed.append({"id": number, "conversations": turns} | image if number != 4 else text[-1])
    (folder / "chat.json").write_text(json.dumps(mixed))
    (folder / "text.json").write_text(json.dumps(text))
    return folder


class Watch(Callback):
    """Notes at each batch: the step, the sequence length that the language model saw, which weights have a
    gradient, and which changed."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.widths: list[int] = []
        self.modes: list[str] = []
        self.changed: list[set[str]] = []
        self.graded: list[set[str]] = []
        self.rates: list[dict[str, float]] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def note(module: Any, args: tuple, kwargs: dict) -> None:
            if torch.is_grad_enabled():  # not the teacher
                self.widths.append(kwargs["inputs_embeds"].shape[1])
                self.modes.append(attachment_of(pl_module.model).settings.mode if pl_module.plan else "none")

        language_model = next(m for n, m in pl_module.model.named_modules() if n.endswith("language_model"))
        language_model.register_forward_pre_hook(note, with_kwargs=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(trainer.global_step)
        self.rates.append({group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups})
        self.before = {name: p.detach().clone() for name, p in pl_module.model.named_parameters()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        after = dict(pl_module.model.named_parameters())
        self.graded.append({name for name, value in after.items() if value.grad is not None})
        self.changed.append({name for name, value in self.before.items() if not torch.equal(value, after[name])})


class Interrupt(Callback):
    """Breaks a run off where it says, at the given batch counted from 0.

    Args:
        batch: which batch.
        where: `start`, `backward`, `optimizer` (before its step), `step` (within it) or `end` of the batch.
        kind: name of the exception: KeyboardInterrupt or RuntimeError.
    """

    def __init__(self, batch: int, where: str = "end", kind: str = "KeyboardInterrupt") -> None:
        self.batch, self.where, self.kind = batch, where, kind
        self.count = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.count += 1
        self._break("start")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._break("step"))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._break("backward")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._break("optimizer")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._break("end")

    def _break(self, where: str) -> None:
        if where == self.where and self.count == self.batch:
            raise {"KeyboardInterrupt": KeyboardInterrupt, "RuntimeError": RuntimeError}[self.kind]("broken off")


class Poison(Callback):
    """Makes a weight or a gradient NaN before the given step."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and self.what == "weight":
            with torch.no_grad():
                pl_module.trainable[-1].fill_(float("nan"))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step and self.what == "gradient":
            next(p.grad for p in pl_module.trainable if p.grad is not None).fill_(float("nan"))


class Workplace:
    """A folder with the base and the data, where recipes are written and run."""

    def __init__(self, base: Path, chat: Path, folder: Path) -> None:
        self.base, self.chat, self.folder = base, chat, folder

    def recipe(self, name: str = "run", data: dict[str, Any] | None = None, **sections: Any) -> Path:
        """Write a recipe: three steps of full fine-tuning with pooling, unless the sections say otherwise."""
        trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 3, "logger": False}
        trainer |= {"default_root_dir": str(self.folder / name), "gradient_clip_val": 1.0}
        model = {"base": str(self.base), "plan": {"pruner": "pool", "keep_tokens": 16}}
        model["optimizer"] = {"lr": 1e-2, "warmup": 1, "pruner_lr": 1e-2}
        arguments = {"train": str(self.chat / "chat.json"), "image_folder": str(self.chat / "images"), "batch_size": 2}
        values = {
            "trainer": trainer | sections.pop("trainer", {}),
            "model": model | sections.pop("model", {}),
            "data": {"class_path": "ChatData", "init_args": arguments | (data or {})},
            **sections,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def fit(self, name: str = "run", *args: str, **sections: Any) -> RecipeCLI:
        """Run a recipe."""
        return run_recipe(["fit", "--config", str(self.recipe(name, **sections)), *args], progress=False)

    def last(self, name: str = "run") -> Path:
        return self.folder / name / "checkpoints" / "last.ckpt"

    def saved(self, name: str = "run") -> dict[str, Any]:
        return torch.load(self.last(name), weights_only=True)


def callback(cls: type, **arguments: Any) -> dict[str, Any]:
    """A callback as recipes name it."""
    return {"class_path": f"training.helpers.{cls.__name__}", "init_args": arguments}


def found(run: RecipeCLI, cls: type) -> Any:
    """The callback of a class in a finished run."""
    return next(c for c in run.trainer.callbacks if type(c).__name__ == cls.__name__)


def weights(run: RecipeCLI) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in run.model.model.named_parameters()}
