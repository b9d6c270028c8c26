"""`tpcompress evaluate`: one model on a task of the user."""

from __future__ import annotations

from typing import Any

from tpcompress.cli.console import console


def evaluate(
    model: str,
    data: str | None = None,
    metric: str | None = None,
    plan: str | None = None,
    task: dict[str, Any] | str | None = None,
    image_folder: str | None = None,
    split: str = "train",
    num_images: int | None = None,
    generate: bool = False,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    stop: str | None = None,
    dense: bool = False,
    blank: bool = False,
    out: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> int:
    """Score a base, an export or a run on your data by any metric.

    Example:
        tpcompress evaluate exported held_out.json --metric anls --out runs/scores

    Example:
        tpcompress evaluate tiny_llava --task benchmark --num-images 32 --plan divprune:16@0

    Args:
        model: base (folder, hub id, tiny_llava), exported folder, or folder or checkpoint of a run.
        data: chat data of any format that training takes.
        metric: metric by name or dotted path (package.module:Class); default: that of the task.
        plan: plan to attach instead of the model's own: plan file, recipe, or PRUNER:KEEP@LAYER.
        task: task instead of data: name or mapping.
        image_folder: folder that relative image paths start from.
        split: split of the data, if it has several.
        num_images: rows to use, from the first; default: all (benchmark: 320).
        generate: generate the answers also where the metric could count teacher-forced ones.
        max_new_tokens: longest generated answer.
        batch_size: questions per call of generation.
        stop: text at which a generated answer ends.
        dense: take the plan of an export or run off.
        blank: replace the images by blank ones, for the blank baseline.
        out: folder for scores and answers; default: nothing is written.
        dtype: weight dtype: float32, bfloat16, float16 or auto.
        device: device, e.g. cpu or cuda.
    """
    from tpcompress.evaluation.scoring.metrics import find_metric
    from tpcompress.evaluation.single import run_evaluation
    from tpcompress.evaluation.tasks import create_task, list_tasks

    if (data is None) == (task is None):
        raise ValueError("evaluate needs either data or --task, such as: tpcompress evaluate MODEL held_out.json.")
    config: dict[str, Any] = {"type": task} if isinstance(task, str) else dict(task or {})
    if data is not None:
        config = {"type": "chat", "data": data, "image_folder": image_folder, "split": split}
    config |= {"num_images": num_images} if num_images is not None else {}
    config |= {"metric": metric} if metric is not None else {}
    wanted = config.get("metric") or getattr(list_tasks().get(config.get("type", "")), "metric", "exact_match")
    if "generate" not in config and (generate or not find_metric(str(wanted)).reads_logits):
        config["generate"] = {
            "max_new_tokens": max_new_tokens, "batch_size": batch_size, "stop": [stop] if stop else [],
        }  # fmt: skip
    more: dict[str, Any] = {"dense": dense, "blank": blank, "dtype": dtype, "device": device}
    run_evaluation(model, [create_task(config)], plan, out, console, **more)
    return 0
