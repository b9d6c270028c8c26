"""An export folder is complete or absent, and cannot be loaded without its plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export.helpers import two_stages
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import tpcompress as tp
from tpcompress.export import load, verify
from tpcompress.pruners.topk import keep_topk


class OutsidePruner(tp.Pruner):
    """Keeps the tokens of largest norm; not part of tpcompress."""

    name = "outside"

    def forward(self, tokens: tp.TokenView, num_keep_B: Tensor) -> tp.Selection:
        scores_BV = tokens.vision_BVD.norm(dim=-1)
        return tp.Selection(keep_topk(scores_BV, tokens.valid_BV, num_keep_B), scores_BV)


def test_existing_folder(trained: Any, processor: Any, folder: Path) -> None:
    with pytest.raises(FileExistsError, match="exists already; choose another folder, or replace it: overwrite=True"):
        tp.export(trained, processor, folder)
    (folder / "leftover").write_text("of the earlier export")
    tp.export(trained, processor, folder, overwrite=True)
    assert not (folder / "leftover").exists()
    assert verify(folder).ok
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]


def test_overwrite_spares_what_is_no_export(trained: Any, processor: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not an export of tpcompress"):
        tp.export(trained, processor, tmp_path / "thesis", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is not a folder"):
        tp.export(trained, processor, tmp_path / "file", overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert verify(tp.export(trained, processor, tmp_path / "empty", overwrite=True)).ok


def test_overwrite_the_folder_that_was_loaded(folder: Path, processor: Any) -> None:
    # Its tensors may still be mapped from the file that is replaced.
    model = load(folder)
    tp.export(model, processor, folder, overwrite=True)
    assert verify(folder).ok


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_interrupted(error: BaseException, trained: Any, folder: Path, processor: Any) -> None:
    class Broken:
        """A processor that fails after the weights were written."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return processor(*args, **kwargs)

        def save_pretrained(self, where: Path) -> None:
            assert any(Path(where).iterdir())
            raise error

    for out, overwrite in ((folder.parent / "new", False), (folder, True)):
        with pytest.raises(type(error)):
            tp.export(trained, Broken(), out, overwrite=overwrite)
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]
    assert verify(folder).ok


def test_permissions_are_those_of_new_folders(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    assert exported.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_links_are_not_followed(trained: Any, processor: Any, folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    with pytest.raises(FileExistsError):
        tp.export(trained, processor, folder.parent / "link", overwrite=True)


# ------------------------------------------------------------------------------------------------- what is refused


def test_no_plan(base: Any, processor: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No plan is attached"):
        tp.export(base, processor, tmp_path / "out")


def test_refused_models(base: Any, processor: Any, tmp_path: Path) -> None:
    model = tp.attach(base, two_stages())
    with pytest.raises(ValueError, match="processor must be"):
        tp.export(model, None, tmp_path / "out")
    with pytest.raises(ValueError, match="2 stages, got 1 budget;"):
        tp.export(model, processor, tmp_path / "out", budgets=[tp.Budget(keep_tokens=1)])
    with pytest.raises(FileNotFoundError, match="No recipe at"):
        tp.export(model, processor, tmp_path / "out", recipe=tmp_path / "nowhere.yaml")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="^Quantized weights cannot be exported"):
        tp.export(model, processor, tmp_path / "out")
    del model.config.quantization_config
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'extra.bias' first; export a plain LlavaForConditionalGeneration"):
        tp.export(model, processor, tmp_path / "out")
    del model.extra
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="offloaded"):
        tp.export(model, processor, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_pruner_from_outside(base: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[OutsidePruner.__module__])
    model = tp.attach(base, tp.PruningPlan([tp.Stage(OutsidePruner(), keep_tokens=9)]))
    out = tp.export(model, processor, tmp_path / "out")
    reason = json.loads((out / "manifest.json").read_text())["code"]["reason"]
    assert reason.endswith("OutsidePruner' is not part of tpcompress")
    assert f"It loads with tpcompress only: {reason}." in (out / "README.md").read_text()
    assert not list(out.glob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    with pytest.raises(ValueError, match="is outside tpcompress; load with allow_outside=True"):
        load(out)
    assert "is outside tpcompress" in str(verify(out))
    assert type(tp.plan_of(load(out, allow_outside=True)).stages[0].pruner) is OutsidePruner
    assert verify(out, allow_outside=True).ok


def test_stock_transformers_refuses(fresh: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    run, _ = fresh
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("contains custom code which must be executed") == 3
    assert "LlavaForConditionalGeneration Error no file named model.safetensors" in run.stdout


@pytest.mark.parametrize("variant", ["tpcompress", "pruned", None])
def test_no_variant_of_the_stock_class_finds_the_weights(exported: Path, tmp_path: Path, variant: str | None) -> None:
    shards = tmp_path / "shards"
    load(exported).save_pretrained(shards, max_shard_size="300KB")
    for folder in (exported, shards):
        with pytest.raises(OSError, match="no file named model"):
            LlavaForConditionalGeneration.from_pretrained(folder, variant=variant)


def test_every_safetensors_file_of_an_export_holds_weights(exported: Path, tmp_path: Path) -> None:
    """Engines load whatever `*.safetensors` finds, so the probe has another suffix; saving again leaves no old file."""
    assert [path.name for path in exported.glob("**/*.safetensors")] == ["tpcompress.safetensors"]
    assert (exported / "probe.tensors").is_file()
    model, folder = load(exported), tmp_path / "again"
    model.save_pretrained(folder, max_shard_size="300KB")
    index = json.loads((folder / "tpcompress.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    model.save_pretrained(folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["tpcompress.safetensors"]
    assert "transformers_weights" not in (folder / "config.json").read_text()
    for options in ({}, {"config": load(exported).config}, {"dtype": torch.bfloat16}):
        again = load(folder, **options)
        assert not hasattr(again.config, "transformers_weights")
        wanted = options.get("dtype", torch.float32)
        assert all(torch.equal(p, model.state_dict()[name].to(p.dtype)) for name, p in again.named_parameters())
        assert again.dtype == wanted
