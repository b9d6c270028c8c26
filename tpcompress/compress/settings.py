"""What a compression was started with, kept in its folder: a repeated command continues, another one is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpcompress.compress.recipe import check_amounts
from tpcompress.files import write_atomic
from tpcompress.insertion.budget import Budget
from tpcompress.insertion.plan_source import read_keep

FILE = "compress.json"


@dataclass(frozen=True)
class CompressSettings:
    """Arguments of a compression that decide its results.

    Attributes:
        model: base model: folder, hub id or bundled name.
        data: chat data in any format that training takes.
        keep: budget of the plan: tokens per image (64), a fraction (1/9) or a ratio (0.11).
        servable: choose among rules that a serving engine can run on this model.
        rules: pruners to choose among; empty for all that run without training.
        lora: rank of LoRA; 0 trains all weights.
        steps: optimizer steps of each run; None for one epoch, of at least 100 steps.
        batch_size: rows per training batch; None for that of the family's recipe.
        metric: metric of ranking and table; None for that of the chat task.
        image_folder: folder that relative image paths start from.
        split: split of the data.
        seed: seed of the split and of the runs.

    Raises:
        ValueError: `keep` is not a budget, or a number is too small.
    """

    model: str
    data: str
    keep: str
    servable: bool = False
    rules: tuple[str, ...] = ()
    lora: int = 64
    steps: int | None = None
    batch_size: int | None = None
    metric: str | None = None
    image_folder: str | None = None
    split: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            Budget(**read_keep(self.keep))
        except ValueError as error:
            raise ValueError(f"--keep {self.keep}: {error}") from None
        check_amounts(self.lora, self.steps, self.batch_size)

    @property
    def budget(self) -> float:
        """The budget as comparison files write it: a count, or a ratio."""
        (value,) = read_keep(self.keep).values()
        return float(value) if isinstance(value, float) else int(value)


def keep_settings(settings: CompressSettings, folder: Path) -> None:
    """Write the settings into a new folder, or check that the folder was made with the same ones.

    Raises:
        ValueError: the folder was made with other settings, or holds something else.
    """
    path, now = folder / FILE, json.loads(json.dumps(asdict(settings)))
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no compression; choose another --out.")
        write_atomic(path, json.dumps({"settings": now}, indent=1))
        return
    then = json.loads(path.read_text())["settings"]
    names = [name for name in now if then.get(name) != now[name]]
    if names:
        changed = "; ".join(f"{name}: {_word(then.get(name))}, now {_word(now[name])}" for name in names)
        raise ValueError(f"{folder} holds a compression with other arguments ({changed}); choose another --out.")


def forget_settings(folder: Path) -> None:
    """Remove the settings and the split of a folder without results, and the folder if nothing else is in it."""
    (folder / FILE).unlink(missing_ok=True)
    for name in ("data", "rank"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _word(value: Any) -> str:
    return "none" if value in (None, []) else str(value)
