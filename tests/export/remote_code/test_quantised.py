"""Quantised loading: the export equals its base, loaded in the same way, with the plan attached.

Runs where a quantiser is installed: torchao, optimum-quanto or bitsandbytes. Its 4-bit weights are not among them:
their CPU kernel takes no layer that is narrower than a block of 64, as those of the tiny towers are.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from export.remote_code.child import answers
from export.remote_code.folders import exported
from safetensors.torch import load_file
from support import tiny_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

import tpcompress as tp
from tpcompress.families import list_families

pytestmark = pytest.mark.slow
FAMILIES = ("llava", "qwen2_5_vl", "internvl")
PLAN = "gate, then divprune inside"


def int8_of_torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


QUANTISERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "torchao int8": ("torchao", int8_of_torchao),
    "quanto int8": ("optimum.quanto", lambda: QuantoConfig(weights="int8")),
    "bitsandbytes 8 bit": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
}


def installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_quantised(quantiser: str, family: str, tmp_path: Path) -> None:
    package, config = QUANTISERS[quantiser]
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    export = exported(family, PLAN)
    inputs = load_file(export.inputs)
    whole = tp.load(export.folder)
    model = AutoModelForImageTextToText.from_pretrained(export.folder, quantization_config=config()).eval()
    for name, value in whole.token_pruners.state_dict().items():
        found = model.token_pruners.state_dict()[name]
        assert found.dtype == torch.float32
        assert torch.equal(found, value), name
    tiny_model(family, *list_families()[family].tiny.variants[0]).save_pretrained(tmp_path)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config()).eval()
    tp.attach(base, tp.plan_of(whole))
    base.token_pruners.load_state_dict(whole.token_pruners.state_dict())
    found, expected = answers(model, inputs), answers(base, inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    with tp.mode(model, "off"), tp.mode(whole, "off"), torch.no_grad():
        gap = (model(**inputs).logits.float() - whole(**inputs).logits).abs().mean()
        assert 0 < gap < whole(**inputs).logits.abs().mean() / 2, "quantised, and still the same model"
