"""Export round trips: the loaded model has the logits, tokens and plan of the trained one."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from export.helpers import answer, make_base, make_inputs, run_python, two_stages
from safetensors import safe_open
from support import every_placed
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import tpcompress as tp
from tpcompress.export import load, verify
from tpcompress.insertion.attach import attachment_of

ASKING = {"type": "learned_gate", "scorer": {"type": "local_global", "question": True}}


def equal(a: Any, b: Any, inputs: dict[str, torch.Tensor] | None = None) -> bool:
    """Bit-equal logits and the same greedy tokens."""
    inputs = inputs or make_inputs()
    return all(torch.equal(x, y) for x, y in zip(answer(a, inputs), answer(b, inputs), strict=True))


def names(folder: Path) -> dict[str, torch.Tensor]:
    """Stored tensors by name, over all shards."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_fresh_process_is_bit_equal(trained: Any, fresh: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    run, saved = fresh
    assert run.returncode == 0, run.stderr
    for theirs, ours in zip(torch.load(saved), answer(trained, make_inputs()), strict=True):
        assert torch.equal(theirs, ours)


def test_pruning_shows(trained: Any, exported: Path, base: Any, inputs: dict[str, torch.Tensor]) -> None:
    # Without this, all equalities here could hold for an export that lost its plan.
    loaded = load(exported)
    with tp.record(loaded) as trace:
        pruned = answer(loaded, inputs)[0]
    assert [stage.vision_out for stage in trace.stages][:2] == [[32, 32], [8, 8]]
    dense = answer(base, inputs)[0]
    assert (pruned[:, -1] - dense[:, -1]).abs().max() > 1e-2


def test_plan_and_weights_survive(trained: Any, exported: Path) -> None:
    loaded = load(exported)
    assert tp.plan_of(loaded).to_dict() == tp.plan_of(trained).to_dict() == loaded.config.token_pruning
    theirs, ours = trained.token_pruners.state_dict(), loaded.token_pruners.state_dict()
    assert len(ours) > 5
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert isinstance(loaded, LlavaForConditionalGeneration)
    assert not loaded.training


@every_placed(0, 2)
def test_every_pruner(config: dict[str, Any], layer: int, base: Any, round_trip: Any) -> None:
    model = tp.attach(base, tp.PruningPlan([tp.Stage(config, layer, keep_tokens=9)]))
    assert equal(model, round_trip(model))


@pytest.mark.parametrize(("positions", "scope"), [("compact", "image"), ("original", "prompt")])
def test_policies(positions: str, scope: str, base: Any, round_trip: Any) -> None:
    stages = [tp.Stage("uniform", keep_ratio=0.5), tp.Stage("fastv", 2, keep_ratio=0.25)]
    model = tp.attach(base, tp.PruningPlan(stages, positions=positions, scope=scope))
    assert equal(model, round_trip(model))


def test_caller_keeps_their_model(base: Any, round_trip: Any) -> None:
    model = tp.attach(base, two_stages(), mode="mask").train()
    model.model.vision_tower.eval()
    training = {name: module.training for name, module in model.named_modules()}
    curriculum = [tp.Budget(keep_ratio=0.9), tp.Budget(keep_ratio=0.8)]
    attachment_of(model).set_defaults(budgets=tuple(curriculum))
    parameters = {name: (p, p.clone()) for name, p in model.named_parameters()}
    loaded = round_trip(model)
    assert attachment_of(model).settings.mode == "mask"
    assert attachment_of(model).settings.budgets == tuple(curriculum)
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(p is parameters[n][0] and torch.equal(p, parameters[n][1]) for n, p in model.named_parameters())
    assert type(model) is LlavaForConditionalGeneration
    assert model.config.model_type == "llava"
    assert attachment_of(loaded).settings.mode == "drop"  # and the curriculum's end, not its middle
    assert [stage.keep_tokens for stage in tp.plan_of(loaded).stages] == [32, 8]


def test_other_budgets(base: Any, round_trip: Any) -> None:
    model = tp.attach(base, two_stages())
    final = [tp.Budget(keep_ratio=0.25), tp.Budget(keep_tokens=4)]
    loaded = round_trip(model, budgets=final)
    assert [stage.budget for stage in tp.plan_of(loaded).stages] == final
    with tp.budgets(model, final):
        assert equal(model, loaded)


def test_key_layout_is_stock(exported: Path, base: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "stock")
    stock, ours = names(tmp_path / "stock"), names(exported)
    assert {name for name in ours if not name.startswith("token_pruners.0.")} == set(stock)
    assert all(torch.equal(ours[name], value) for name, value in stock.items())


def test_second_save_is_equal(exported: Path, tmp_path: Path) -> None:
    first = load(exported)
    first.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (exported / "config.json").read_text()
    ours, theirs = names(tmp_path / "again"), names(exported)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert equal(first, load(tmp_path / "again"))


def test_sharded(exported: Path, tmp_path: Path) -> None:
    model = load(exported)
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert equal(model, load(tmp_path / "shards"))


def test_auto_classes(exported: Path) -> None:
    config = AutoConfig.from_pretrained(exported)
    assert (config.model_type, config.base_model_type) == ("tpcompress_llava", "llava")
    assert equal(AutoModelForImageTextToText.from_pretrained(exported), load(exported))
    processor = AutoProcessor.from_pretrained(exported)
    assert type(processor).__name__ == "LlavaProcessor"
    assert processor.tokenizer("<image> w3 w4")["input_ids"][-3:] == [100, 3, 4]


@pytest.mark.slow
def test_fresh_auto_classes_need_only_the_import(exported: Path) -> None:
    code = """
import tpcompress
heavy = {"lightning", "deepspeed", "datasets", "peft"} & set(sys.modules)  # Gemma 4's config brings the tokenizers
assert not heavy, heavy
assert not [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name
            and "auto" not in name]
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
assert len(tpcompress.plan_of(model).stages) == 2
assert not {"lightning", "deepspeed", "datasets"} & set(sys.modules), sys.modules.keys()
"""
    run = run_python(code, exported)
    assert run.returncode == 0, run.stderr


def test_loaded_model_is_a_model_like_any(exported: Path, tmp_path: Path, processor: Any) -> None:
    model = load(exported)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert attachment_of(copied).parts.model is copied
    assert attachment_of(pickled).parts.model is pickled
    again = load(tp.export(model, processor, tmp_path / "again"))
    for other in (copied, pickled, again):
        assert equal(model, other)
    assert verify(tmp_path / "again").ok


def test_detach_gives_the_base(exported: Path, base: Any, tmp_path: Path) -> None:
    model = tp.detach(load(exported))
    assert equal(model, base)
    with pytest.raises(ValueError, match="was detached"):
        model.save_pretrained(tmp_path / "lie")
    assert not (tmp_path / "lie").exists()
    tp.attach(model, tp.PruningPlan([tp.Stage("uniform", keep_tokens=4)]))
    model.save_pretrained(tmp_path / "other")
    assert equal(model, load(tmp_path / "other"))


def test_low_precision_keeps_the_scores_precise(exported: Path) -> None:
    model = load(exported, dtype=torch.bfloat16, device_map="cpu")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.token_pruners.parameters()} == {torch.float32}
    with torch.no_grad():
        model.generate(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in make_inputs().items()},
                       max_new_tokens=2)  # fmt: skip
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_bf16_round_trip(base: Any, round_trip: Any, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    half = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = tp.attach(half, two_stages())
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in make_inputs().items()}
    loaded = round_trip(model)
    assert loaded.dtype == torch.bfloat16
    assert equal(model, loaded, inputs)


def test_cast_model_is_verified_as_it_loads(base: Any, processor: Any, tmp_path: Path) -> None:
    # `to` rounds rotary frequencies and the scorer; loading cannot, so the probe must not hold the rounded answer.
    model = tp.attach(base, two_stages()).to(torch.bfloat16)
    rotary = model.model.language_model.rotary_emb
    out = tp.export(model, processor, tmp_path / "out")
    assert rotary.inv_freq.dtype == model.token_pruners[0].scorer.score.weight.dtype == torch.bfloat16
    assert json.loads((out / "manifest.json").read_text())["conversion"]["logit_gap"] > 0
    assert verify(out).ok


def test_tied_embeddings(round_trip: Any) -> None:
    base = make_base()
    base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = True
    base.lm_head.weight = base.get_input_embeddings().weight
    model = tp.attach(base, two_stages())
    loaded = round_trip(model)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert equal(model, loaded)


def test_manifest(base: Any, processor: Any, tmp_path: Path) -> None:
    base.config._name_or_path = "someone/base"
    model = tp.attach(base, two_stages())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {}\n")
    out = tp.export(
        model, processor, tmp_path / "out", recipe=recipe, trained_with={"arm": "training_aware", "steps": 3}
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["base"] == {
        "model": "someone/base",
        "model_type": "llava",
        "class": "LlavaForConditionalGeneration",
    }
    assert [(s["layer"], s["pruner"], s["retained"], s["budget"]) for s in manifest["stages"]] == [
        (0, "learned_gate", 32, {"keep_tokens": 32}), (3, "divprune", 8, {"keep_tokens": 8}),
    ]  # fmt: skip
    assert (manifest["vision_tokens"], manifest["layer_average"]) == (64, 20.0)
    assert manifest["trained_with"] == {"arm": "training_aware", "steps": 3}
    assert set(manifest["files"]) == {p.name for p in out.iterdir()} - {"manifest.json"}
    assert (out / "recipe.yaml").read_text() == "model: {}\n"
    assert str(tmp_path) not in "".join(p.read_text() for p in out.glob("*.json"))
    again = tp.export(load(out), processor, tmp_path / "again")
    assert json.loads((again / "manifest.json").read_text())["base"]["model"] == "someone/base"
