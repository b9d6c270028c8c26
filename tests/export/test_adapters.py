"""LoRA is merged into what is written, and stays unmerged on the caller's model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export.helpers import answer, make_inputs, two_stages
from peft import LilyConfig, LoraConfig, PromptTuningConfig, get_peft_model

import tpcompress as tp
from tpcompress.export import load, verify
from tpcompress.families import resolve
from tpcompress.training.adapters import add_lora

TARGETS = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def with_lora(model: Any, scale: float = 0.2, **options: Any) -> Any:
    """A PEFT model whose adapters do something."""
    options = {"r": 4, "target_modules": TARGETS} | options
    model = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        elif "modules_to_save" in name:
            parameter.data = parameter.data * 1.1
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"modules_to_save": ["multi_modal_projector"]},
        pytest.param({"use_dora": True}, marks=pytest.mark.slow),
        {"target_modules": ["q_proj", "reduce", "score"]},  # of the pruner, too
    ],
    ids=["lora", "modules_to_save", "dora", "pruner"],
)
def test_merged(options: dict[str, Any], base: Any, processor: Any, tmp_path: Path) -> None:
    model = with_lora(tp.attach(base, two_stages()), **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, tokens = answer(model.get_base_model(), make_inputs())
    with model.disable_adapter():
        assert (answer(model.get_base_model(), make_inputs())[0] - logits).abs().max() > 1e-2
    out = tp.export(model, processor, tmp_path / "out")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    loaded = load(out)
    assert not any("lora" in name for name in loaded.state_dict())
    with tp.record(loaded) as trace:
        merged_logits, merged_tokens = answer(loaded, make_inputs())
    assert trace.stages[1].vision_out == [8, 8]
    assert (merged_logits - logits).abs().max() < 1e-5 * logits.abs().max()
    assert torch.equal(merged_tokens, tokens)
    conversion = json.loads((out / "manifest.json").read_text())["conversion"]
    assert conversion["positions"] == [{"agree": 32, "retained": 32}, {"agree": 8, "retained": 8}]
    assert verify(out).ok


TUNERS = {
    "LORA": {"r": 4},
    "DORA": {"peft_type": "LORA", "r": 4, "use_dora": True},
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "OFT": {"oft_block_size": 8},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "VERA": {"r": 8},
    "LN_TUNING": {"target_modules": ".*language_model.*layernorm"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("IA3", "VERA") else pytest.mark.slow) for n in TUNERS]
)
def test_other_tuners_are_merged(name: str, base: Any, processor: Any, tmp_path: Path) -> None:
    tp.attach(base, two_stages())
    before = answer(base, make_inputs())[0]
    model = add_lora(base, {"peft_type": name} | TUNERS[name], resolve(base), set())
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    logits, tokens = answer(model.eval().get_base_model(), make_inputs())
    assert (logits - before).abs().max() > 1e-2
    loaded = load(tp.export(model, processor, tmp_path / "out"))
    merged_logits, merged_tokens = answer(loaded, make_inputs())
    assert (merged_logits - logits).abs().max() < 1e-5 * logits.abs().max()
    assert torch.equal(merged_tokens, tokens)


def test_a_tuner_that_cannot_merge_is_refused(base: Any, processor: Any, tmp_path: Path) -> None:
    model = get_peft_model(tp.attach(base, two_stages()), LilyConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="^LILY adapters cannot be merged .*; train with LoRA to export.$"):
        tp.export(model, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["BEFT", "LILY", "POLY", "TRAINABLE_TOKENS"])
def test_a_tuner_that_cannot_merge_is_refused_before_it_trains(name: str, base: Any) -> None:
    with pytest.raises(ValueError, match=rf"^lora: {name} adapters cannot be merged, so not exported [^\n]*$"):
        add_lora(base, {"peft_type": name}, resolve(base), set())


def test_attach_after_lora(base: Any, processor: Any, tmp_path: Path) -> None:
    model = tp.attach(with_lora(base), two_stages())
    logits, _ = answer(model.get_base_model(), make_inputs())
    loaded = load(tp.export(model, processor, tmp_path / "out"))
    assert (answer(loaded, make_inputs())[0] - logits).abs().max() < 1e-5 * logits.abs().max()


def test_merging_in_bf16_is_reported(base: Any, processor: Any, tmp_path: Path) -> None:
    model = with_lora(tp.attach(base.to(torch.bfloat16), two_stages()))
    out = tp.export(model, processor, tmp_path / "out")
    assert json.loads((out / "manifest.json").read_text())["conversion"]["logit_gap"] > 0
    assert verify(out).ok


@pytest.mark.slow
def test_an_export_can_be_tuned_and_exported(exported: Path, processor: Any, tmp_path: Path) -> None:
    model = with_lora(load(exported))
    logits, _ = answer(model.get_base_model(), make_inputs())
    loaded = load(tp.export(model, processor, tmp_path / "out"))
    assert (answer(loaded, make_inputs())[0] - logits).abs().max() < 1e-5 * logits.abs().max()
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_disabled_adapter_is_not_exported(base: Any, processor: Any, tmp_path: Path) -> None:
    model = with_lora(tp.attach(base, two_stages()))
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="^Merging the adapters changed the model first at stage 1"):
        tp.export(model, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unmergeable_is_refused(base: Any, processor: Any, tmp_path: Path) -> None:
    tp.attach(base, two_stages())
    inner = with_lora(base).get_base_model()
    with pytest.raises(ValueError, match="pass the PEFT model around it"):
        tp.export(inner, processor, tmp_path / "out")


def test_prompt_tuning_is_refused(base: Any, processor: Any, tmp_path: Path) -> None:
    tp.attach(base, two_stages())
    config = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=64, num_layers=6, num_attention_heads=4,
        num_transformer_submodules=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="cannot be merged"):
        tp.export(get_peft_model(base, config), processor, tmp_path / "out")
