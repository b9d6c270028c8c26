"""`tpcompress rank`: all untrained rules on rows of the user."""

from __future__ import annotations

from typing import Any

from tpcompress.cli.console import console


def rank(
    model: str,
    data: str | None = None,
    budgets: str = "1/9",
    image_folder: str | None = None,
    task: dict[str, Any] | str | None = None,
    rules: str | None = None,
    num_images: int = 64,
    metric: str | None = None,
    out: str = "runs/rank",
    batch_size: int = 16,
    dtype: str = "float32",
    device: str | None = None,
) -> int:
    """Rank all untrained pruners on your rows: score, cost, and a contact sheet of retained tokens.

    Example:
        tpcompress rank tiny_llava --budgets 16,36 --num-images 32

    Example:
        tpcompress rank Qwen/Qwen2.5-VL-3B-Instruct held_out.json --budgets 64,1/9 --rules divprune,dart,visionzip

    Args:
        model: base model: folder, hub id or tiny_llava.
        data: chat data of any format that training takes; default for tiny_llava: the built-in benchmark.
        budgets: vision tokens per image: counts (32,64), ratios (0.25) or fractions (1/9).
        image_folder: folder that relative image paths are resolved against.
        task: task whose rows are used instead of data: name or mapping.
        rules: pruners to rank, with commas between; default: all that need no training.
        num_images: rows to use, from the first.
        metric: metric of the score; default: that of the task.
        out: output folder; the same command resumes an interrupted ranking.
        batch_size: sequences per call.
        dtype: weight dtype: float32, bfloat16, float16 or auto.
        device: device, e.g. cpu or cuda; default: the accelerator if there is one.
    """
    from tpcompress.evaluation.rank import run_rank
    from tpcompress.evaluation.tasks import create_task

    if task is not None and data is not None:
        raise ValueError("Both data and task are given; give one of them.")
    run_rank(
        model, data if task is None else create_task(task), budgets, out, console,
        rules=None if rules is None else [name.strip() for name in rules.split(",")],
        image_folder=image_folder, num_images=num_images, metric=metric, batch_size=batch_size, dtype=dtype,
        device=device,
    )  # fmt: skip
    return 0
