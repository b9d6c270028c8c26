"""Training runs of a bench: trained once, resumed after an interruption, never taken for a run of another recipe."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tpcompress.data.encode import EncodedSequence
from tpcompress.evaluation.engine.cell import Run
from tpcompress.files import write_atomic
from tpcompress.insertion.attach import attachment_of, detach, is_attached
from tpcompress.pruners import Pruner
from tpcompress.training.checkpoint_content import KEY
from tpcompress.training.checkpoints.load import load_trained
from tpcompress.training.checkpoints.read import checkpoint_file, read_checkpoint
from tpcompress.training.datamodules.benchmark import BenchmarkData
from tpcompress.training.recipe.run import RecipeCLI, run_recipe

Kept = dict[tuple[Any, ...], list[EncodedSequence]]
"""Encoded images by (seed, packed, max_length, index)."""

KEY_FILE, DONE = "run.json", "done"


@dataclass(frozen=True)
class Trained:
    """A trained model without its plan, and the pruner that was attached to it.

    Attributes:
        name: name of the run.
        model: in eval mode.
        pruner: trained pruner of the last stage; None if the run was dense.
    """

    name: str
    model: Any
    pruner: Pruner | None


def is_done(folder: Path) -> bool:
    """The run in this folder is finished."""
    return (folder / DONE).is_file()


def check_run(folder: Path, key: dict[str, Any]) -> None:
    """Refuse a folder that holds a run of another recipe, finished or not.

    Args:
        folder: folder of the run.
        key: everything that decides the trained weights, see `Run.key`.

    Raises:
        ValueError: it holds another run.
    """
    if (folder / KEY_FILE).is_file():
        then, now = json.loads((folder / KEY_FILE).read_text()), _plain(key)
        changed = ", ".join(name for name in now if then.get(name) != now[name])
        if not changed:
            return
    elif not (folder / "checkpoints").is_dir():
        return
    else:
        changed = "an earlier version of tpcompress"
    raise ValueError(
        f"{folder} holds a run trained with another setting ({changed}); remove that folder to train it again, or "
        f"choose another --out."
    )


def train(run: Run, base: str, folder: Path, key: dict[str, Any], kept: Kept | None = None) -> None:
    """Train a run, or finish an interrupted one.

    Args:
        run: what to train.
        base: the model it starts from.
        folder: folder of the run.
        key: everything that decides the trained weights, see `Run.key`.
        kept: encoded images of earlier runs, for many short runs, which then show no progress and write no logs; None
            trains as `tpcompress fit` does.

    Raises:
        ValueError: the folder holds another run, or a checkpoint that is damaged.
        NonFiniteLoss: training met a NaN.
        KeyboardInterrupt: interrupted; the next call goes on from the last checkpoint.
    """
    check_run(folder, key)
    resume = _checkpoint_of(folder)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    write_atomic(folder / KEY_FILE, json.dumps(_plain(key), indent=1))
    if not (resume and _is_complete(folder)):
        (folder / "asked.yaml").write_text(yaml.safe_dump(_unpacked(run), sort_keys=False))
        args = ["fit", "--config", str(folder / "asked.yaml"), "--model.base", base]
        args += ["--seed_everything", str(run.seed), "--trainer.default_root_dir", str(folder), *resume]
        args += [] if run.plan is None else ["--model.plan", json.dumps(run.plan.to_dict())]
        if kept is None:
            run_recipe(args)
        else:
            run_recipe([*args, "--trainer.logger", "false"], False, partial(_KeepingCLI, kept=kept))
    write_atomic(folder / DONE, "")


def load_run(run: Run, folder: Path) -> Trained:
    """The model of a finished run, with its plan taken off."""
    model: Any = load_trained(folder).model
    pruner: Any = None
    if is_attached(model):
        pruner = copy.deepcopy(attachment_of(model).pruners[-1])
        detach(model)
    return Trained(run.name, model.eval(), pruner)


def _checkpoint_of(folder: Path) -> list[str]:
    """Arguments of `fit` that resume an interrupted run; none without a checkpoint."""
    try:
        return ["--ckpt_path", str(checkpoint_file(folder))] if folder.is_dir() else []
    except FileNotFoundError:
        return []


def _is_complete(folder: Path) -> bool:
    """The last checkpoint is that of the last step. A damaged one is left to `fit`, which reports it."""
    try:
        saved = read_checkpoint(folder)[KEY]
    except ValueError:
        return False
    return bool(saved["step"] >= saved["steps"])


def _unpacked(run: Run) -> dict[str, Any]:
    """The recipe, with one question per sequence where the plan reads the prompt."""
    recipe = copy.deepcopy(run.recipe)
    data = recipe.get("data")
    if run.plan is not None and run.plan.reads_prompt and isinstance(data, dict):
        arguments = data.get("init_args") or {}
        if "pack" in arguments or str(data.get("class_path")).rpartition(".")[2] == "BenchmarkData":
            data["init_args"] = arguments | {"pack": False}
    return recipe


def _plain(values: Any) -> Any:
    """As JSON gives it back, so that it compares equal to what was read from a file."""
    return json.loads(json.dumps(values, default=str))


# ---------------------------------------------------------------------------------------------------- many short runs


class KeptBenchmark(BenchmarkData):
    """The benchmark, with every image drawn and encoded once for all runs that share `kept`.

    Args:
        like: the data module that it replaces.
        kept: encoded images so far; it grows.
    """

    def __init__(self, like: BenchmarkData, kept: Kept) -> None:
        names = ("num_train", "num_val", "batch_size", "seed", "pack", "num_workers")
        super().__init__(**{name: getattr(like, name) for name in names}, max_length=like.max_length)
        self.kept = kept

    def setup(self, stage: str | None = None) -> None:
        """As in the benchmark; rows are drawn and encoded only where `kept` has no entry."""
        super().setup(stage)
        encode, key = self.collator.encode, (self.seed, self.pack, self.max_length)
        rows: Any = self.train_rows

        def once(row: dict[str, Any], index: int = 0) -> list[EncodedSequence]:
            if (*key, index) not in self.kept:
                self.kept[*key, index] = encode(row["row"](), index)
            return self.kept[*key, index]

        self.collator.encode = once  # type: ignore[method-assign]
        self.train_rows = _Lazy(rows)  # type: ignore[assignment]


class _Lazy:
    """Rows that are drawn only when their content is read."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row": lambda: self.rows[index]}


class _KeepingCLI(RecipeCLI):
    """`fit` on kept images."""

    def __init__(self, args: list[str], progress: bool, kept: Kept) -> None:
        self.kept = kept
        super().__init__(args, progress)

    def before_fit(self) -> None:
        """Lightning's hook between building the parts and using them."""
        if isinstance(self.datamodule, BenchmarkData):
            self.datamodule = KeptBenchmark(self.datamodule, self.kept)
