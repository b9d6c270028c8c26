"""`tpcompress compress`: from a base model and a data file to a verified export and its comparison."""

from __future__ import annotations

from pathlib import Path

from tpcompress.cli.console import console


def compress(
    model: str,
    data: str,
    keep: str = "1/9",
    out: str = "runs/compress",
    servable: bool = False,
    rules: str | None = None,
    lora: int = 64,
    steps: int | None = None,
    batch_size: int | None = None,
    metric: str | None = None,
    image_folder: str | None = None,
    split: str = "train",
    seed: int = 0,
) -> int:
    """Compress a model on your data: choose a rule, train it and a dense control, export, verify and compare.

    Example:
        tpcompress compress Qwen/Qwen2.5-VL-7B-Instruct rows.json --keep 1/9 --out runs/qwen

    Args:
        model: base model: folder, hub id or bundled name.
        data: chat data in any format that training takes; a part is held out.
        keep: budget per image: tokens (64), a fraction (1/9) or a ratio (0.11).
        out: folder of all results; the same command continues there after an interruption.
        servable: train only a plan that a serving engine can run on this model.
        rules: pruners to choose among, such as divprune,pool; default: all that run without training.
        lora: rank of LoRA; 0 trains all weights.
        steps: optimizer steps of each of the two runs; default: one epoch, at least 100.
        batch_size: rows per training batch.
        metric: metric of ranking and table; tpcompress list metrics.
        image_folder: folder that relative image paths start from.
        split: split of the data, if it has several.
        seed: seed of the split and of training.
    """
    from tpcompress.compress.run import run_compress
    from tpcompress.compress.settings import CompressSettings

    names = tuple(name.strip() for name in (rules or "").split(",") if name.strip())
    settings = CompressSettings(
        model, data, keep, servable, names, lora, steps, batch_size, metric, image_folder, split, seed
    )
    return 0 if run_compress(settings, Path(out), console).verified else 1
