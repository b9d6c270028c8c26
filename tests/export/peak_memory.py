"""Prints the peak memory of an export over the size of its weights: peak_memory.py OUT TIED ADAPTED."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import peft  # noqa: E402
import torch  # noqa: E402
from export.helpers import make_processor  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

import tpcompress as tp  # noqa: E402
from tpcompress.export.memory import PeakMemory, return_freed, weight_bytes  # noqa: E402
from tpcompress.families.llava import tiny_config  # noqa: E402


def make_model(tied: bool, layers: int = 10) -> Any:
    """A LLaVA of 0.6 GB, each tensor allocated once."""
    config = tiny_config()
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 1024, 2816, layers
    text.num_attention_heads = text.num_key_value_heads = 16
    text.head_dim, text.vocab_size = 64, 20000 if tied else 10000
    text.tie_word_embeddings = config.tie_word_embeddings = tied
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                value = torch.nn.Parameter(torch.empty(old.shape))
                module._parameters[name] = made.setdefault(id(old), value)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    for module in model.modules():
        model._init_weights(module)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def run(out: Path, tied: bool, adapted: bool, layers: int) -> None:
    """Make a model and export it."""
    torch.manual_seed(0)
    model = tp.attach(make_model(tied, layers), "divprune:16@0")
    if adapted:
        lora = peft.LoraConfig(r=16, target_modules=r".*language_model.*_proj", init_lora_weights=False)
        model = peft.get_peft_model(model, lora).eval()
    tp.export(model, make_processor(), out)


if __name__ == "__main__":
    out, tied, adapted = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3] == "True"
    run(out.with_name("first"), tied, adapted, 1)  # libraries are loaded, and not counted
    return_freed()
    peak = PeakMemory()
    run(out, tied, adapted, 10)
    print((peak.above_start or 0) / weight_bytes(out))
