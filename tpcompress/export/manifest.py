"""Contents of manifest.json: what an export holds, and which runtimes can run it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tpcompress.export.budgets import Range, as_dict, describe_ranges
from tpcompress.export.classes import stock_class
from tpcompress.export.folder import FORMAT, MANIFEST, SCHEMA
from tpcompress.export.license import license_of
from tpcompress.export.probe import Probe
from tpcompress.export.runtimes import runtimes_of
from tpcompress.families import family_of, resolve
from tpcompress.insertion.attach import plan_of
from tpcompress.insertion.plan import PruningPlan
from tpcompress.version import __version__


def describe(
    base: PreTrainedModel, plan: PruningPlan, probe: Probe, trained_budgets: Sequence[Range] | None = None
) -> dict[str, Any]:
    """Describe an export; `bake.export` adds merging, training and files.

    Counts are those of the first image of the probe (or of its first tile, or of its prompt, by the scope of the plan).
    In families with one image size (`tokens_per_image` is not None) they hold for every image.
    """
    config = base.config
    model_type = getattr(config, "base_model_type", None) or config.model_type
    total, depth = probe.about["stages"][0]["vision_tokens"][0], len(resolve(base).layers)
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "versions": {"tpcompress": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
        "base": {
            "model": _base_name(base),
            "model_type": model_type,
            "class": stock_class(model_type).__name__,
            **license_of(base.config.name_or_path),
        },
        "dtype": probe.about["dtype"],
        "vision_tokens": total,
        "tokens_per_image": family_of(config).tokens_per_image(config),
        "layer_average": plan.layer_average(total, depth),
        "decoder_layers": depth,
        "stages": stages(plan, total),
        "positions": plan.positions,
        "scope": plan.scope,
        "prompt_dependent": plan.prompt_dependent,
        "merges": any(stage.pruner.merges for stage in plan.stages),
        "runtimes": runtimes_of(plan, config),
        "trained_budgets": describe_ranges(trained_budgets, total),
        "plan": plan.to_dict(),
    }


FACTS = ("vision_tokens", "layer_average", "decoder_layers", "positions", "scope", "prompt_dependent", "merges")
"""Entries of the manifest that follow from the model and its probe; `verify` compares them."""


def differing_facts(manifest: dict[str, Any], model: PreTrainedModel, probe: Probe) -> dict[str, str]:
    """Whether a manifest states something else than the loaded model shows: `manifest.json`, and what."""
    found = describe(model, plan_of(model), probe)
    odd = [name for name in FACTS if name in manifest and manifest[name] != found[name]]
    keys = ("stage", "layer", "pruner", "budget", "retained")
    listed = [[stage.get(key) for key in keys] for stage in manifest.get("stages", [])]
    if listed != [[stage[key] for key in keys] for stage in found["stages"]]:
        odd.append("stages")
    if manifest["base"].get("class") != found["base"]["class"]:
        odd.append("base")
    return {MANIFEST: f"states {', '.join(odd)} that the model does not have"} if odd else {}


def stages(plan: PruningPlan, total: int) -> list[dict[str, Any]]:
    """Budget and retained count of every stage, for a row of `total` vision tokens."""
    return [
        {
            "stage": number,
            "layer": stage.layer,
            "pruner": stage.pruner.name,
            "budget": as_dict(stage.budget),
            "retained": kept,
            "merges": stage.pruner.merges,
            "learned": stage.pruner.learned,
            "prompt_dependent": stage.layer > 0 or stage.pruner.prompt_dependent,
        }
        for number, (stage, kept) in enumerate(zip(plan.stages, plan.counts(total), strict=True))
    ]


def _base_name(base: PreTrainedModel) -> str | None:
    """Hub id of the base, or the name of its local folder without the path."""
    name = base.config.name_or_path
    if not name:
        return None
    if Path(name).is_dir():
        manifest = Path(name) / MANIFEST
        if manifest.is_file():  # an export of an export has the base of the first
            return json.loads(manifest.read_text(encoding="utf-8")).get("base", {}).get("model")
        return Path(name).resolve().name
    return name
