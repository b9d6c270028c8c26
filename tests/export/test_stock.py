"""`stock`: the same weights as an unpruned checkpoint; shards; and that an export copies no weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export.helpers import ROOT, answer, make_inputs, two_stages
from export.test_adapters import with_lora
from export.test_round_trip import equal
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import tpcompress as tp
from tpcompress.export import adapters, load, verify
from tpcompress.export.memory import PeakMemory, weight_bytes
from tpcompress.models import load_base


@pytest.mark.parametrize("adapted", [False, True])
def test_stock_is_the_model_in_mode_off(adapted: bool, base: Any, processor: Any, tmp_path: Path) -> None:
    model = tp.attach(base, two_stages())
    model = with_lora(model) if adapted else model
    out = tp.export(model, processor, tmp_path / "out", stock=tmp_path / "stock")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock")
    assert type(stock) is LlavaForConditionalGeneration
    assert not any("token_pruners" in name for name in stock.state_dict())
    loaded, trained = load(out), model.get_base_model() if adapted else model
    with tp.disabled(loaded):
        assert equal(stock, loaded)
    with tp.disabled(trained):
        logits = answer(trained, make_inputs())[0]
    assert (answer(stock, make_inputs())[0] - logits).abs().max() <= 1e-5 * logits.abs().max()
    manifest = json.loads((tmp_path / "stock" / "manifest.json").read_text())
    files = json.loads((out / "manifest.json").read_text())
    assert (manifest["export"], files["stock"]) == ("out", "stock")
    assert manifest["export_files"] == {"tpcompress.safetensors": files["files"]["tpcompress.safetensors"]["sha256"]}
    assert "Unpruned, on purpose" in (tmp_path / "stock" / "README.md").read_text()
    assert type(AutoProcessor.from_pretrained(tmp_path / "stock")) is type(processor)
    assert load_base(str(tmp_path / "stock")) is not None


def test_stock_of_a_loaded_export(exported: Path, processor: Any, tmp_path: Path) -> None:
    loaded = load(exported)
    tp.export(loaded, processor, tmp_path / "again", stock=tmp_path / "stock")
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock")
    with tp.disabled(loaded):
        assert equal(stock, loaded)


@pytest.mark.parametrize("name", ["out", "out/stock", "."])
def test_folders_of_their_own(name: str, trained: Any, processor: Any, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileExistsError), match=r"folders of their own|exists already"):
        tp.export(trained, processor, tmp_path / "out", stock=tmp_path / name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("adapted", [False, True])
def test_shards(adapted: bool, base: Any, processor: Any, tmp_path: Path) -> None:
    model = tp.attach(base, two_stages())
    model = with_lora(model) if adapted else model
    out = tp.export(model, processor, tmp_path / "out", max_shard_size="300KB")
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert not list(out.glob("model*.safetensors*"))
    index = json.loads((out / "tpcompress.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert verify(out).ok
    loaded = load(out)
    loaded.save_pretrained(tmp_path / "again", max_shard_size="300KB")
    for name in (*shards, "tpcompress.safetensors.index.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name
    (out / shards[1]).unlink()
    assert not verify(out).ok


def test_five_gigabytes_are_one_file(exported: Path) -> None:
    assert [path.name for path in exported.glob("*.safetensors")] == ["tpcompress.safetensors"]


def test_no_second_copy_of_the_weights(base: Any, processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The model that is probed and written has the caller's own tensors, and at most one merged layer lives at once."""
    model = with_lora(tp.attach(base, two_stages()))
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    alive: list[Any] = []
    most = [0]
    merge, view = adapters.MergedLayer.merged, adapters.merged_view

    def counted(layer: Any) -> Any:
        import weakref

        made = merge(layer)
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(made)]
        most[0] = max(most[0], len(alive))
        return made

    monkeypatch.setattr(adapters.MergedLayer, "merged", counted)
    merged = view(model)
    assert {t.untyped_storage().data_ptr() for t in merged.state_dict().values()} <= own
    tp.export(model, processor, tmp_path / "out")
    assert most[0] <= 2


def test_peak_memory_counts_what_is_held() -> None:
    peak = PeakMemory()
    if peak.above_start is None:
        pytest.skip("no /proc")
    held = torch.ones(40_000_000)
    del held
    assert 120e6 < (peak.above_start or 0) < 400e6
    assert "x the model" in (peak.line(160_000_000) or "")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_peak_memory(tied: bool, adapted: bool, tmp_path: Path) -> None:
    """Of a model of 0.6 GB, above what its process had before the model was built."""
    script = Path(__file__).with_name("peak_memory.py")
    command = [sys.executable, str(script), str(tmp_path / "out"), str(tied), str(adapted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=None)
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout.split()[-1])
    assert weight_bytes(tmp_path / "out") > 0.5e9
    assert 1.0 <= ratio <= 1.2, done.stdout
