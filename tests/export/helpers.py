"""A tiny processor and a tiny model, and what both sides of a round trip are asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tpcompress.families.llava import tiny_config
from tpcompress.insertion.plan import PruningPlan, Stage

ROOT = Path(__file__).parents[2]
PLACEHOLDER = 100


def make_processor() -> LlavaProcessor:
    """Words w3 .. w89 and the placeholder; images of 32 pixels."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 99, "<image>": PLACEHOLDER}
    words = {f"w{i}": i for i in range(3, 90)} | {"USER:": 90, "ASSISTANT:": 91}
    tokenizer = Tokenizer(models.WordLevel(words | special, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(images, fast, patch_size=4, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1)  # fmt: skip


def make_base(**config: Any) -> Any:
    """A tiny random LLaVA whose answer depends on its image."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(tiny_config(**config), attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            fan = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) * fan**-0.5
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def make_inputs(batch: int = 2, seed: int = 5) -> dict[str, torch.Tensor]:
    """A left-padded batch with one image each, other than the probe's."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.zeros(2, batch, 64 + 12, dtype=torch.long)
    for b in range(batch):
        row = torch.randint(3, 90, (12 - b,), generator=generator).tolist()
        row[4:4] = [PLACEHOLDER] * 64
        ids[b, -len(row) :], mask[b, -len(row) :] = torch.tensor(row), 1
    pixels = torch.randn(batch, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def answer(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of one call and six greedy tokens."""
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[PLACEHOLDER])
    return logits, tokens


GATE = {"type": "learned_gate", "scorer": {"type": "local_global", "width": 16}}


def two_stages() -> PruningPlan:
    """A learned stage before the language model and a deterministic one inside."""
    return PruningPlan([Stage(GATE, keep_tokens=32), Stage("divprune", 3, keep_tokens=8)])


STOCK = """
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModel, LlavaConfig, LlavaForConditionalGeneration
for cls in (AutoConfig, AutoModel, AutoModelForImageTextToText, LlavaForConditionalGeneration):
    try:
        cls.from_pretrained(sys.argv[1], trust_remote_code=False)
    except (ValueError, OSError) as error:
        print(cls.__name__, str(error).splitlines()[0])
    else:
        raise SystemExit(f"{cls.__name__} loaded it, unpruned")
"""
"""What transformers says of an export without this package."""

FRESH = f"""
del sys.modules['tpcompress']
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from export.helpers import answer, make_inputs
import tpcompress as tp
torch.save(answer(tp.load(sys.argv[1]), make_inputs()), sys.argv[2])
"""
"""The answer of the export in a process that has not written it."""


def run_python(code: str, *arguments: object, root: Path | None = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a Python of its own, with tpcompress importable or (root=None) not."""
    block = (
        "import sys; sys.modules['tpcompress'] = None\n"
        if root is None
        else f"import sys; sys.path[:0] = [{str(root)!r}]\n"
    )
    command = [sys.executable, "-c", block + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
