"""`export`: writes an attached model, trained or not, to a folder with the plan, its weights and a probe.

The caller's model is left unchanged and its weights are shared, not copied: adapters are merged layer by layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from tpcompress.export.adapters import merged_view
from tpcompress.export.budgets import CurvePoint, Range, own_budgets, probed_budgets, with_budgets
from tpcompress.export.card import CARD, card
from tpcompress.export.classes import stock_class
from tpcompress.export.folder import MANIFEST, check_free, file_records, new_folder, write_json
from tpcompress.export.loaded_precision import as_loaded, is_rounded
from tpcompress.export.manifest import describe
from tpcompress.export.patch import write_merged
from tpcompress.export.probe import Probe, check_probe_prunes, first_probe, record_probe
from tpcompress.export.probe_diff import ProbeDiff
from tpcompress.export.registry import config_class, register_model
from tpcompress.export.remote_code import code_or_reason
from tpcompress.export.stock import check_apart, stock_card, weights_of, with_weights, write_stock
from tpcompress.export.trained_probe import check_reload
from tpcompress.export.weights import MAX_SHARD_SIZE
from tpcompress.families import family_of
from tpcompress.insertion.attach import attachment_of
from tpcompress.insertion.budget import Budget
from tpcompress.insertion.plan import PruningPlan

logger = logging.getLogger(__name__)

NOT_KEPT = ("model_type", "architectures", "_name_or_path", "auto_map")
"""Fields of a base's config that an exported config has its own values for."""

Measure = Callable[[Path, dict[str, Any]], Sequence[CurvePoint]]
"""(loadable folder, manifest so far) -> accuracy of the export at each measured budget."""


def export(
    model: nn.Module,
    processor: Any,
    out: str | Path,
    *,
    probe_inputs: Mapping[str, Any] | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    trained_with: Mapping[str, Any] | None = None,
    budgets: Sequence[Budget] | None = None,
    trained_budgets: Sequence[Range] | None = None,
    measure: Measure | None = None,
    overwrite: bool = False,
    trained_probe: Mapping[str, Any] | None = None,
    stock: str | Path | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write a folder that loads with its plan attached, and only so.

    Adapters are merged, the pruners' weights are included, and budgets are the plan's own. The model itself stays
    attached, unmerged and in its mode. The probe records the written weights; if merging changed their behaviour, the
    manifest states by how much. Call it from one rank only.

    Args:
        model: a transformers model with a plan attached, or a PEFT model around one.
        processor: processor of the model; saved in the same folder.
        out: folder to write; it appears only when complete.
        probe_inputs: processor outputs with an image, stored and replayed by `verify`; default: a built-in input.
        recipe: YAML file or mapping that the model was trained with, saved as recipe.yaml.
        trained_with: facts for the manifest, e.g. {"arm": "training_aware", "steps": 800}.
        budgets: final budgets, one per stage; default: the plan's.
        trained_budgets: lowest and highest budget of each stage at the end of training. If they differ, the probe also
            records both ends.
        measure: called before the folder appears; its result becomes the accuracy table of the model card.
        overwrite: replace an earlier export at `out`.
        trained_probe: answer of the model in another process, which trained it (`TrainedProbe.to_dict()`), that the
            written weights must repeat.
        stock: a second folder, for the same weights as an unpruned stock checkpoint.
        max_shard_size: largest weight file, in bytes or as text such as 5GB.

    Returns:
        The folder.

    Raises:
        TypeError: not a transformers model.
        ValueError: no plan attached, quantized or offloaded weights, adapters that cannot be merged, a plan that prunes
            nothing in the probe, a plan or probe that cannot be written, or a model that is not the one that trained.
        FileExistsError: `out` exists.
        FileNotFoundError: no such recipe.
    """
    out = Path(out).expanduser()
    check_free(out, overwrite)
    stock = None if stock is None else Path(stock).expanduser()
    if stock is not None:
        check_apart(out, stock, overwrite)
    attached = attachment_of(model)
    base, plan = attached.parts.model, with_budgets(attached.plan, budgets)
    check_writable(base, processor)
    recipe_yaml = recipe_text(recipe)
    values = own_budgets(plan)
    probe = first_probe(base, processor, probe_inputs, values)
    inputs = probe.inputs
    merged = base if model is base else merged_view(model)
    conversion, changed = None, merged is not base or is_rounded(base)
    with as_loaded(merged):
        if changed:
            trained, probe = probe, record_probe(merged, inputs, values)
            conversion = _conversion(trained, probe, merged is not base)
        reload = None if trained_probe is None else check_reload(trained_probe, merged, "The exported model")
        ends = probed_budgets(plan, trained_budgets, probe.about["stages"][0]["vision_tokens"][0])
        probe = probe.beside([record_probe(merged, inputs, end) for end in ends])
    check_probe_prunes(probe)
    baked = bake(merged, plan)
    with new_folder(out, overwrite) as folder, nullcontext() if stock is None else new_folder(stock, overwrite) as twin:
        baked.save_pretrained(folder, max_shard_size=max_shard_size)
        write_merged(baked, merged, folder)
        processor.save_pretrained(folder)
        probe.save(folder)
        if recipe_yaml is not None:
            (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        manifest = describe(base, plan, probe, trained_budgets)
        code, reason = code_or_reason(plan, manifest["base"]["model_type"])
        manifest["code"] = {"files": [] if code is None else sorted(code.files), "reason": reason}
        if reason is not None:
            logger.warning("Exported without code for trust_remote_code: %s.", reason)
        manifest |= {"conversion": conversion, "reload": reload, "trained_with": dict(trained_with or {})}
        if attached.untrained:
            manifest["untrained_pruners"] = attached.untrained
            logger.warning("Not trained, with the weights it was built with: %s.", ", ".join(attached.untrained))
        points = [] if measure is None else measure(folder, manifest)
        manifest["budget_curve"] = [point.to_dict() for point in points]
        (folder / CARD).write_text(card(manifest, out.name), encoding="utf-8")
        if stock is not None:
            manifest["stock"] = stock.name
        files = file_records(folder)
        write_json(folder / MANIFEST, manifest | {"files": files})
        if twin is not None and stock is not None:
            about = {"export": out.name, "export_files": weights_of(files)}
            about |= {"base": manifest["base"], "trained_with": manifest["trained_with"]}
            write_stock(
                twin, base, merged, processor, stock_card(manifest, stock.name, out.name), about, max_shard_size
            )
    return out


def save_pretrained(model: nn.Module, out: str | Path, *, processor: Any, **options: Any) -> Path:
    """Export a model under the name that transformers uses: `export(model, processor, out, **options)`.

    Args:
        model: with a plan attached.
        out: folder to write.
        processor: processor of the model.
        **options: see `export`.

    Returns:
        The folder.
    """
    return export(model, processor, out, **options)


def bake(base: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Convert an attached model to its exported class, with shared tensors; only `save_pretrained` may be called on it.

    Raises:
        ValueError: its weights are not those of its stock class plus the pruners', or differ where the class
            shares one.
    """
    config = exported_config(base.config, plan, base.dtype)
    stock = config.base_model_type
    with torch.device("meta"):
        baked = register_model(stock)(config, allow_outside=True)
    return with_weights(baked, base)


def exported_config(config: PretrainedConfig, plan: PruningPlan, dtype: torch.dtype) -> PretrainedConfig:
    """Exported config of a stock or exported config."""
    stock = getattr(config, "base_model_type", None) or config.model_type
    kept = {k: v for k, v in config.to_dict().items() if k not in NOT_KEPT}
    made = config_class(stock).from_dict(kept | {"token_pruning": plan.to_dict()})
    for name in made.sub_configs:  # as loading does, so that saving again gives the same file
        if getattr(made, name) is not None:  # Gemma 4 without audio
            getattr(made, name).dtype = dtype
    return made


def _conversion(trained: Probe, exported: Probe, merged: bool) -> dict[str, Any]:
    """Change of the probe by merging adapters or by restoring float32 buffers, for the manifest.

    Raises:
        ValueError: a change beyond rounding in float32. In half precision it is only logged.
    """
    found = ProbeDiff.of(trained, exported)
    what = "Merging the adapters" if merged else "Restoring rotary frequencies and pruners to float32"
    if found.differs is not None:
        message = f"{what} changed the model first {found.differs}"
        if trained.about["dtype"] == "float32":
            raise ValueError(f"{message}; enable the adapter that was trained, or give other probe_inputs.")
        logger.warning("%s; train with dtype=float32, or load the base in its dtype instead of casting it.", message)
    positions = [{"agree": stage.agree, "retained": stage.trained} for stage in found.stages]
    return {"adapters_merged": merged, "logit_gap": found.logit_gap, "positions": positions}


def check_writable(base: PreTrainedModel, processor: Any) -> None:
    """Check that the model can be written as plain weights of its stock class.

    Raises:
        ValueError: another class, quantized or offloaded weights, or not a processor.
    """
    family_of(base.config)
    stock = stock_class(getattr(base.config, "base_model_type", None) or base.config.model_type)
    if not isinstance(base, stock):
        raise ValueError(f"Export writes {stock.__name__} models, got {type(base).__name__}; load it as that class.")
    if getattr(base, "is_quantized", False) or getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            "Quantized weights cannot be exported; load the base in bfloat16, apply the adapters, then export."
        )
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError("Some weights are offloaded; load the model on one device (without device_map), then export.")
    if not hasattr(processor, "save_pretrained"):
        raise ValueError(f"processor must be a transformers processor, got {type(processor).__name__}.")


def recipe_text(recipe: str | Path | Mapping[str, Any] | None) -> str | None:
    """A recipe, given as file or mapping, as YAML; None for None.

    Raises:
        FileNotFoundError: no such file.
    """
    if recipe is None:
        return None
    if isinstance(recipe, Mapping):
        return yaml.safe_dump(dict(recipe), sort_keys=False)
    if not Path(recipe).is_file():
        raise FileNotFoundError(f"No recipe at {recipe}; give a YAML file, or leave it out.")
    return Path(recipe).read_text(encoding="utf-8")
