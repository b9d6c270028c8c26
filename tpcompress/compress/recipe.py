"""Writes the recipe of a run from a base model, a data file and a few choices; the rest comes from bundled recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tpcompress.auto_register import PREFIX
from tpcompress.export.runtimes import not_servable
from tpcompress.families.catalogue import find
from tpcompress.insertion.plan import PruningPlan
from tpcompress.models import load_config
from tpcompress.recipe_files import merge_recipes, read_recipe

SHARED = "shared/lora.yaml"
PRESETS = {
    "qwen2_5_vl": "qwen2_5_vl/divprune_lora.yaml",
    "qwen3_vl": "qwen3_vl/divprune_lora.yaml",
    "internvl": "internvl3/divprune_lora.yaml",
    "smolvlm": "smolvlm2/divprune_lora.yaml",
    "llava_onevision": "llava_onevision/divprune_lora.yaml",
    "gemma3": "gemma3/divprune_lora.yaml",
}
"""Bundled recipes whose settings (batch size, length) a family starts from; the others start from the shared ones."""

MIN_STEPS = 100
"""Optimizer steps of a run whose data has fewer batches."""


@dataclass(frozen=True)
class RunChoices:
    """What a user decides about a run.

    Attributes:
        model: base model: folder, hub id or bundled name.
        data: training data, in any format that `ChatData` takes.
        plan: plan in any form; None trains the dense model.
        out: folder of the run.
        lora: rank of LoRA; 0 trains all weights.
        steps: optimizer steps; None for one epoch, of at least `MIN_STEPS` steps.
        image_folder: folder that relative image paths start from.
        batch_size: rows per batch; None for that of the family's recipe.
        val: validation data.
        val_fraction: share of `data` for validation.
        servable: refuse a plan that no serving engine can run.
    """

    model: str
    data: str
    plan: str | PruningPlan | None
    out: str
    lora: int = 64
    steps: int | None = None
    image_folder: str | None = None
    batch_size: int | None = None
    val: str | None = None
    val_fraction: float = 0.0
    servable: bool = False


def family_of_base(model: str) -> str:
    """Name of the family of a base model, from its config alone.

    Raises:
        FileNotFoundError, ValueError: no such model, or one of no known family.
    """
    kind = load_config(model).model_type
    if kind.startswith(PREFIX):
        raise ValueError(f"{model} is an export, which has a plan already; give the base model that it was made from.")
    return find(kind).name


def make_recipe(choices: RunChoices, num_rows: int, gpu: bool | None = None) -> dict[str, Any]:
    """The values of a recipe.

    Args:
        choices: what the user decided.
        num_rows: rows of the training data.
        gpu: train in bfloat16 with gradient checkpointing; None if there is an accelerator.

    Raises:
        FileNotFoundError, ValueError: no such model, one of no known family, a plan that cannot be read, or one that no
            engine can run if the run is to be servable.
    """
    check_amounts(choices.lora, choices.steps, choices.batch_size)
    values = merge_recipes(read_recipe(PRESETS.get(family_of_base(choices.model), SHARED)), {})
    gpu = torch.accelerator.is_available() if gpu is None else gpu
    plan = None if choices.plan is None else PruningPlan.of(choices.plan)
    if choices.servable and plan is not None:
        check_servable(plan, choices.model)
    batch = choices.batch_size or values["data"]["init_args"]["batch_size"]
    accumulate = max(1, min(values["trainer"]["accumulate_grad_batches"], num_rows // (batch * MIN_STEPS)))
    steps = choices.steps or max(MIN_STEPS, num_rows // (batch * accumulate))
    trainer = {
        "max_epochs": -1, "max_steps": steps, "accumulate_grad_batches": accumulate,
        "precision": "bf16-mixed" if gpu else "32-true", "default_root_dir": choices.out,
    }  # fmt: skip
    model: dict[str, Any] = {"base": choices.model, "plan": _plan_values(plan)}
    model |= {"dtype": "bfloat16" if gpu else "float32", "gradient_checkpointing": gpu}
    model |= _training(plan, choices.lora, steps)
    model["optimizer"] = values["model"]["optimizer"] | {"warmup": min(100, steps // 10)}
    if not choices.lora:
        model["optimizer"] |= {"lr": 2.0e-5, "projector_lr": 2.0e-5}
    data = {"train": choices.data, "image_folder": choices.image_folder, "batch_size": batch}
    data |= {"val": choices.val, "val_fraction": choices.val_fraction, "num_workers": 4 if gpu else 0}
    over = {"trainer": trainer, "model": model, "checkpoints": {"every": min(500, max(1, steps // 2))}}
    return merge_recipes(values, over | {"data": {"init_args": data}})


def check_servable(plan: PruningPlan, model: str) -> None:
    """Refuse a plan that no serving engine can run on a model.

    Raises:
        ValueError: with the reason.
    """
    reason = not_servable(plan, load_config(model))
    if reason is not None:
        raise ValueError(f"No serving engine can run this plan: {reason}; choose another, or leave out --servable.")


def check_amounts(lora: int, steps: int | None, batch_size: int | None) -> None:
    """Refuse a negative rank of LoRA, and steps or a batch size below 1.

    Raises:
        ValueError: one of them.
    """
    for name, value, least in (("lora", lora, 0), ("steps", steps, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")


def write_recipe(values: dict[str, Any], path: Path, command: str) -> None:
    """Write a recipe with the command that runs it; an existing file must hold the same values.

    Raises:
        ValueError: the file holds another recipe.
    """
    if path.is_file():
        if read_recipe(path) != values:
            raise ValueError(f"{path} is the recipe of a run with other arguments; choose another --out.")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {command}\n{yaml.safe_dump(values, sort_keys=False)}", encoding="utf-8")


def _plan_values(plan: PruningPlan | None) -> dict[str, Any] | None:
    return None if plan is None else plan.to_dict()


def _training(plan: PruningPlan | None, lora: int, steps: int) -> dict[str, Any]:
    """What trains, on which losses, and how the budget falls: with the unpruned model as teacher where it is free."""
    model: dict[str, Any] = {"lora": None, "train": "full", "teacher": None, "losses": ["Label"], "schedule": None}
    if lora:
        model |= {"lora": {"r": lora, "lora_alpha": 2 * lora, "lora_dropout": 0.05}, "train": ["projector"]}
    if plan is None:
        return model
    if lora:  # LoRA and plan off are the base, so a teacher costs no second copy of the weights
        model |= {"teacher": "AdapterOff", "losses": ["Label", {"class_path": "KL", "init_args": {"weight": 0.5}}]}
    if any(stage.pruner.learned for stage in plan.stages):
        model["pruner_phase"] = {"steps": max(1, steps // 4), "losses": ["Label"]}
    elif all(stage.keep_ratio is not None for stage in plan.stages) or plan.stages[0].keep_tokens:
        first = plan.stages[0].keep_ratio
        start = round(1 / first, 2) if first else 9.0
        model["schedule"] = {"class_path": "Linear", "init_args": {"start": max(1.0, start)}}
    return model
