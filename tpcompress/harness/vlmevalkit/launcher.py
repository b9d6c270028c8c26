"""Registers a model of tpcompress in VLMEvalKit and hands over to VLMEvalKit's own run.

python -m tpcompress.harness.vlmevalkit --pretrained exported --data MMBench_DEV_EN --work-dir outputs
python -m tpcompress.harness.vlmevalkit --pretrained llava-hf/llava-1.5-7b-hf --plan divprune:64 --data MME POPE

Options that are not listed here go to VLMEvalKit's `run.py`, which must not be given `--model` or `--config`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from tpcompress.errors import first_line
from tpcompress.evaluation.results.vlmevalkit import RECORD
from tpcompress.evaluation.tables import to_json
from tpcompress.files import write_atomic
from tpcompress.harness.served import ModelSettings
from tpcompress.harness.vlmevalkit.model import LOADED, model_class
from tpcompress.version import __version__

SKIP = "SKIP_ERR"
"""Environment variable with which VLMEvalKit writes errors as answers."""
NUMBERS = {
    "min_pixels": int, "max_pixels": int, "max_new_tokens": int, "num_frames": int, "fps": float, "max_frames": int,
}  # fmt: skip
RUN_OPTIONS = ("max_new_tokens", "num_frames", "fps", "max_frames")


def main(args: Sequence[str]) -> int:
    """Run VLMEvalKit on one model; 1 if an answer failed, 2 for a mistake, which is reported in one line."""
    try:
        return run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(args: Sequence[str]) -> int:
    """As `main`, but mistakes are raised.

    Raises:
        FileNotFoundError, ValueError, ImportError: a mistake in the options, or VLMEvalKit is not installed.
    """
    options, rest = _parser().parse_known_args(list(args))
    for name in ("--model", "--config"):
        if name in rest:
            raise ValueError(f"{name} belongs to this launcher, which registers the model; give --pretrained.")
    if os.environ.get(SKIP) == "1":
        raise ValueError(f"{SKIP}=1 makes VLMEvalKit count errors as answers; unset it.")
    cls = model_class()
    given = {k: v for k, v in vars(options).items() if v not in (None, False) and k not in ("name", "vlmevalkit")}
    ModelSettings(**{key: value for key, value in given.items() if key not in RUN_OPTIONS})  # mistakes before the run
    name = options.name or model_name(given)
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(cls, **given)
    script = _script(options.vlmevalkit)
    before, loaded = sys.argv, len(LOADED)
    sys.argv = [str(script), "--model", name, *rest]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before
        sys.path.remove(str(script.parent))
        made = LOADED[loaded:]
        _write_record(_folder(rest) / name, name, given, made)
    errors = [error for model in made for error in model.errors]
    for model in made:
        for line in [model.served.description, *model.tally.lines()]:
            print(line)
        if model.served.plan is not None:
            for dataset in model.tally.unpruned():
                print(f"WARNING: the plan prunes nothing on {dataset}: every vision token is retained.")
    if errors:
        print(f"error: {len(errors)} answers failed, so scores are wrong; the first: {errors[0]}", file=sys.stderr)
    return 1 if errors else 0


def model_name(given: dict[str, Any]) -> str:
    """A name for files: the folder or repository, and the plan or budget."""
    words = [Path(str(given["pretrained"])).name]
    words += [str(given[key]) for key in ("plan", "keep_tokens", "keep_ratio") if key in given]
    words += ["dense"] if given.get("dense") else []
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tpcompress.harness.vlmevalkit", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    for field in fields(ModelSettings):
        option = f"--{field.name.replace('_', '-')}"
        if field.name == "dense":
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=NUMBERS.get(field.name, str), required=field.name == "pretrained")
    for name in RUN_OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=NUMBERS[name])
    parser.add_argument("--name", help="name of the model in files; default: from --pretrained and --plan")
    parser.add_argument("--vlmevalkit", help="folder of the clone with run.py; default: beside the installed package")
    return parser


def _script(folder: str | None) -> Path:
    """VLMEvalKit's run.py.

    Raises:
        FileNotFoundError: it is not there.
    """
    import vlmeval

    path = (Path(folder).expanduser() if folder else Path(str(vlmeval.__file__)).resolve().parents[1]) / "run.py"
    if not path.is_file():
        raise FileNotFoundError(f"No {path}; give the folder of your clone of VLMEvalKit: --vlmevalkit FOLDER.")
    return path


def _folder(rest: Sequence[str]) -> Path:
    """The work folder of the run."""
    if "MMEVAL_ROOT" in os.environ:
        return Path(os.environ["MMEVAL_ROOT"])
    given = dict(zip(rest, [*rest[1:], ""], strict=True))
    joined = next((word.partition("=")[2] for word in rest if word.startswith("--work-dir=")), None)
    return Path(joined or given.get("--work-dir") or "./outputs")


def _write_record(folder: Path, name: str, given: dict[str, Any], made: Sequence[Any]) -> None:
    """What `tpcompress compare` reads beside the scores; counts of data sets that were answered earlier are kept."""
    if not made:
        return
    try:
        version = importlib.metadata.version("vlmeval")
    except importlib.metadata.PackageNotFoundError:
        version = None
    path, counts = folder / RECORD, dict[str, Any]()
    if path.is_file():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
            counts = old["counts"] if old["arguments"] == given else {}
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path} is replaced, as it cannot be read ({first_line(error)}).", file=sys.stderr)
    for model in made:
        for dataset, (prompts, seen, before, after) in model.tally.sums.items():
            means = {"vision_tokens": before / seen, "retained_tokens": after / seen} if seen else {}
            counts[dataset] = {"prompts": prompts, "with_media": seen} | means
    settings = {"max_new_tokens": made[-1].settings.max_new_tokens, "vlmeval": version, "video": _video(made[-1])}
    folder.mkdir(parents=True, exist_ok=True)
    record = {"model": name, "arguments": given, "settings": settings, "counts": counts, "tpcompress": __version__}
    write_atomic(path, to_json(record))


def _video(model: Any) -> str:
    return f"frames {model.nframe}, fps {model.fps}" if model.VIDEO_LLM else ""
