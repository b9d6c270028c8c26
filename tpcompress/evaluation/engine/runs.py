"""Runs of a study: a recipe made of parts, on pictures that are drawn and encoded once per process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from tpcompress.data.encode import EncodedSequence
from tpcompress.lab.study.cells import Training
from tpcompress.training.datamodules.chat_benchmark import BenchmarkData
from tpcompress.training.recipe.run import RecipeCLI

Kept = dict[tuple[Any, ...], list[EncodedSequence]]
"""Encoded pictures by (seed, packed, index)."""


class KeptBenchmark(BenchmarkData):
    """The benchmark, with every picture drawn and encoded once for all runs that share `kept`.

    Args:
        like: the data module whose place it takes.
        kept: what is there already; it grows.
    """

    def __init__(self, like: BenchmarkData, kept: Kept) -> None:
        names = ("num_train", "num_val", "batch_size", "seed", "pack", "num_workers")
        super().__init__(**{name: getattr(like, name) for name in names}, max_length=like.max_length)
        self.kept = kept

    def setup(self, stage: str | None = None) -> None:
        """As ever; what is read and encoded passes through `kept`."""
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
    """Rows that are drawn only if somebody asks for their content."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row": lambda: self.rows[index]}


class StudyRun(RecipeCLI):
    """`fit` on kept pictures.

    Args:
        args: as on the shell.
        kept: encoded pictures of earlier runs.
    """

    def __init__(self, args: list[str], kept: Kept) -> None:
        self.kept = kept
        super().__init__(args, progress=False)

    def before_fit(self) -> None:
        """Lightning's hook between building the parts and using them."""
        if isinstance(self.datamodule, BenchmarkData):
            self.datamodule = KeptBenchmark(self.datamodule, self.kept)


def train(training: Training, base: str, folder: Path, kept: Kept) -> None:
    """Do a run from its start; a checkpoint of an interrupted attempt gives way, as runs here are short.

    Args:
        training: what to do.
        base: the model it starts from.
        folder: of the run.
        kept: encoded pictures of earlier runs.

    Raises:
        NonFiniteLoss: training met a NaN.
        KeyboardInterrupt: interrupted.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "asked.yaml").write_text(yaml.safe_dump(training.recipe, sort_keys=False))
    args = ["fit", "--config", str(folder / "asked.yaml"), "--model.base", base]
    args += ["--seed_everything", str(training.seed), "--trainer.default_root_dir", str(folder)]
    args += ["--trainer.logger", "false"]
    if training.plan is not None:
        args += ["--model.plan", json.dumps(training.plan.to_dict())]
        args += ["--data.init_args.pack", "false"] if training.plan.reads_prompt else []
    StudyRun(args, kept)
