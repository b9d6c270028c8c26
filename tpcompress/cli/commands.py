"""Commands of `tpcompress`, one function each; parameters are options, docstrings are help texts with an example."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape

from tpcompress.cli.compress import compress
from tpcompress.cli.console import console
from tpcompress.cli.evaluate import evaluate
from tpcompress.cli.export import export
from tpcompress.cli.lab import cache_teacher, estimators, study
from tpcompress.cli.look_up import families, pruners, show_list
from tpcompress.cli.onnx import onnx
from tpcompress.cli.push import push
from tpcompress.cli.rank import rank
from tpcompress.cli.serve import serve


def fit(args: list[str]) -> int:
    """Train from a base model and data, or from a recipe; any setting of a recipe can be overridden.

    Example:
        tpcompress fit Qwen/Qwen2.5-VL-7B-Instruct rows.json --plan divprune:1/9 --lora 64 --out runs/mine

    Example:
        tpcompress fit --config recipes/tiny_llava/pool_full.yaml --model.optimizer.lr 1e-4

    Example:
        tpcompress fit --config recipes/tiny_llava/pool_full.yaml --ckpt-path last
    """
    from tpcompress.training.recipe.run import run_recipe

    run = run_recipe(args)
    if args[0] == "fit" and run.trainer.is_global_zero:
        from tpcompress.training.recipe.following import following

        console.print(escape(following(run.trainer, run.model)), soft_wrap=True, highlight=False)
    return 0


def validate(args: list[str]) -> int:
    """Compute the validation loss of a recipe, before or after training; `evaluate` scores answers by a metric.

    Example:
        tpcompress validate --config recipes/tiny_llava/pool_full.yaml
    """
    return fit(args)


def verify(folder: str) -> int:
    """Replay the stored probe of an exported folder in a fresh process; exit code 1 if the model differs.

    Example:
        tpcompress verify exported

    Args:
        folder: exported folder.
    """
    from tpcompress.export import verify_in_fresh_process

    report = verify_in_fresh_process(folder)
    console.print(escape(str(report)), soft_wrap=True)
    return 0 if report.ok else 1


def compare(
    config: str,
    out: str | None = None,
    base: str | None = None,
    data: str | None = None,
    image_folder: str | None = None,
    metric: str | None = None,
    task: str | None = None,
) -> int:
    """Compare dense, training-free and training-aware pruning; print a table, write report and figures.

    Example:
        tpcompress compare recipes/tiny_llava/compare.yaml --out runs/compare

    Example:
        tpcompress compare my.yaml --base runs/my_model --data held_out.json --metric anls --out runs/mine

    Example:
        tpcompress compare recipes/photo_llava/free.yaml --task photos

    Example:
        tpcompress compare recipes/eval/compare.yaml

    Args:
        config: comparison file; its `results` are result files of lmms-eval and VLMEvalKit.
        out: output folder; default: that of the file.
        base: base model instead of that of the file.
        data: chat data to test on, instead of the task of the file.
        image_folder: folder that relative image paths start from.
        metric: metric by name or dotted path, instead of that of the file.
        task: name of a task, such as photos, instead of that of the file.

    Raises:
        ValueError: both data and task.
    """
    from tpcompress.evaluation.compare.run import run_comparison

    if data is not None and task is not None:
        raise ValueError("--data and --task both say what to test on; give one of them.")
    given = {"base": base, "data": data, "image_folder": image_folder, "metric": metric, "task": task}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if data is not None:
        changes |= {"task": "benchmark", "tasks": ()}
    if task is not None:
        changes |= {"tasks": ()}
    run_comparison(config, out, console, **changes)
    return 0


def quickstart(out: str = "runs/quickstart") -> int:
    """Compare, train, export, verify and ask a question on the bundled base, in less than ten minutes.

    Example:
        tpcompress quickstart

    Args:
        out: output folder.
    """
    from tpcompress.cli.quickstart import run_quickstart

    return run_quickstart(Path(out), console)


def inspect_model(
    model: str,
    image: str | None = None,
    prompt: str = "Describe what is shown.",
    plan: str | None = None,
    out: str = "inspect.png",
    video: str | None = None,
    num_frames: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
) -> int:
    """Show what every stage of a plan does to one prompt: tokens, sequence, cache, and an image of retained tokens.

    Example:
        tpcompress inspect tiny_llava --image photo.png --prompt "what ?" --plan divprune:36@0

    Args:
        model: folder of a model, hub id, tiny_llava, exported folder, or folder of a run.
        image: image file, or several with commas between.
        prompt: question; `<image>` and `<video>` mark the places of images and videos (default: first).
        plan: plan file, recipe, or PRUNER:KEEP@LAYER (divprune:64@0,dart:0.1@8); default: that of the export or run.
        out: PNG file to write.
        video: video file, or several with commas between.
        num_frames: frames of each video, spread evenly.
        dtype: weight dtype: float32, bfloat16, float16 or auto.
        device: device, e.g. cpu or cuda.
    """
    from tpcompress.evaluation.inspect import run_inspection

    run_inspection(model, image, prompt, plan, out, dtype, device, console, video, num_frames)
    console.print(f"Retained tokens: {out}", soft_wrap=True, highlight=False)
    return 0


def find_layer(
    model: str,
    data: str | None = None,
    image_folder: str | None = None,
    task: dict[str, Any] | str | None = None,
    num_samples: int = 32,
    threshold: float = 0.01,
    layers: list[int] | None = None,
    out: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
) -> int:
    """Find the first layer from which a model does not need its vision tokens (VTW): KL to the dense model by layer.

    Example:
        tpcompress find-layer tiny_llava --num-samples 8 --out vtw.yaml

    Args:
        model: folder of a model, hub id, or tiny_llava.
        data: chat data for calibration, as in recipes; default for tiny_llava: the built-in benchmark.
        image_folder: folder that relative image paths are resolved against.
        task: task whose rows are used instead of data: name or mapping.
        num_samples: images, with one question each.
        threshold: KL in nats that all later layers must stay below.
        layers: layers to try; default: all at which a stage may act.
        out: plan file to write for the layer that was found.
        seed: seed of the selection of samples and of the interval.
        dtype: weight dtype: float32, bfloat16, float16 or auto.
        device: device, e.g. cpu or cuda.
    """
    from tpcompress.evaluation.find_layer import run_find_layer

    run_find_layer(model, data, image_folder, num_samples, threshold, layers, out, seed, dtype, device, console, task)
    return 0


GROUPS: dict[str, dict[str, Callable[..., int]]] = {
    "Train and ship": {
        "compress": compress, "fit": fit, "validate": validate, "export": export, "verify": verify, "serve": serve,
        "push": push, "onnx": onnx, "quickstart": quickstart,
    },
    "Measure": {
        "evaluate": evaluate, "compare": compare, "rank": rank, "inspect": inspect_model, "find-layer": find_layer,
    },
    "Look up": {"list": show_list, "pruners": pruners, "families": families},
    "Lab": {"study": study, "estimators": estimators, "cache-teacher": cache_teacher},
}  # fmt: skip
"""Commands by their name on the shell, under the headings of the help."""

COMMANDS: dict[str, Callable[..., int]] = {name: run for group in GROUPS.values() for name, run in group.items()}

RECIPE_COMMANDS = ("fit", "validate")
"""Commands whose options are the settings of a recipe."""
