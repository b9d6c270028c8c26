"""Save the base in the layout of the hub, with its tower, and its own weights alone, which are what ships.

What ships (`reader.safetensors`, a few MB) is the projector and the language model, trained here, and the statistics of
the features that they were trained on. The tower comes from the package that carries it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_base.publish import CHAT_TEMPLATE
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import (
    Dinov2Model,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from word_processor import llava_processor, word_tokenizer

from photos.model import BOS, BOS_ID, EOS, EOS_ID, IMAGE, PAD, PAD_ID, UNKNOWN, VOCABULARY, Reader, base_config
from photos.tower import IMAGE_MEAN, IMAGE_STD, PATCH, SIDE

READER = "reader.safetensors"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer."""
    split = pre_tokenizers.WhitespaceSplit()
    return word_tokenizer(VOCABULARY, split, PAD, BOS, EOS, UNKNOWN, IMAGE)


def build_processor() -> LlavaProcessor:
    """Build the processor."""
    return llava_processor(build_tokenizer(), SIDE, PATCH, IMAGE_MEAN, IMAGE_STD, CHAT_TEMPLATE)


def reader_weights(reader: Reader, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Weights of projector and language model; the projector takes raw features instead of standardised ones.

    Args:
        reader: the trained parts.
        mean, std: statistics (C,) with which features were standardised in training.
    """
    weights = {name: weight.detach().clone() for name, weight in reader.model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied to the embeddings
    first = "model.multi_modal_projector.linear_1"
    scaled = weights[f"{first}.weight"] / std
    weights[f"{first}.bias"] -= scaled @ mean
    weights[f"{first}.weight"] = scaled
    return {name: weight.contiguous() for name, weight in weights.items()}


def save_reader(weights: dict[str, Tensor], folder: Path) -> None:
    """Save the trained parts in fp16: the file that ships."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.half() for name, weight in weights.items()}, folder / READER)


def load_reader(folder: Path) -> dict[str, Tensor]:
    """The trained parts in fp32.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = folder / READER
    if not path.is_file():
        raise FileNotFoundError(f"No trained parts at {path}; train them with --train.")
    return {name: weight.float() for name, weight in load_file(path).items()}


@torch.no_grad()
def assemble(
    tower: Dinov2Model, weights: dict[str, Tensor], layers: int | None = None
) -> LlavaForConditionalGeneration:
    """The whole base: tower, projector and language model.

    The position table of the tower is resized to the scenes once, with the tower's own function, so that the config
    states the size and the count of tokens that the base has.
    """
    config = base_config() if layers is None else base_config(layers)
    patches = torch.zeros(1, (SIDE // PATCH) ** 2 + 1, tower.config.hidden_size)
    table = tower.embeddings.interpolate_pos_encoding(patches, SIDE, SIDE)
    config.vision_config = type(tower.config)(**(tower.config.to_dict() | {"image_size": SIDE}))
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").float().eval()
    resized = tower.state_dict() | {"embeddings.position_embeddings": table}
    model.model.vision_tower.load_state_dict(resized)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if "vision_tower" not in name and name != "lm_head.weight"]
    if missing or unexpected:
        raise ValueError(f"The trained parts are of another base: missing {missing[:3]}, unexpected {unexpected[:3]}.")
    model.tie_weights()
    return model


def publish(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save everything that `from_pretrained` needs, in fp16: 50 MB."""
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=False, max_new_tokens=4
    )
    model.half().save_pretrained(folder)
    build_processor().save_pretrained(folder)
