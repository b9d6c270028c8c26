"""One training run from a recipe: LightningCLI with this project's defaults, usable from code and from the shell."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from tpcompress.bundled import find_config
from tpcompress.training import datamodule, schedules  # noqa: F401  their classes become names in recipes
from tpcompress.training.callbacks import Checkpoints
from tpcompress.training.module import PruningModule

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

RECIPE = "recipe.yaml"


class SaveRecipe(SaveConfigCallback):
    """Writes the complete recipe beside the checkpoints: a run says how it was made."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(folder / RECIPE), skip_none=False, overwrite=True, multifile=False)


class RecipeCLI(LightningCLI):
    """`fit` and `validate` with recipes."""

    def __init__(self, args: list[str], progress: bool = True) -> None:
        defaults: dict[str, Any] = {"default_root_dir": "runs/fit", "log_every_n_steps": 10}
        defaults |= {"enable_progress_bar": progress, "enable_model_summary": False}
        self.wants_progress = progress
        super().__init__(
            PruningModule,
            L.LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveRecipe,
            trainer_defaults=defaults,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        # One seed for everything that is drawn; recipes set `seed_everything` alone.
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_as_seed)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        if self.wants_progress and sys.stderr.isatty():
            kwargs.setdefault("callbacks", []).append(RichProgressBar())
        return super().instantiate_trainer(**kwargs)


def run_recipe(args: list[str], progress: bool = True) -> RecipeCLI:
    """Run `fit` or `validate` with arguments as on the shell, e.g. ["fit", "--config", "recipes/..."].

    Raises:
        FileNotFoundError: the recipe does not exist.
        ValueError: a key or value of the recipe is wrong.
        NonFiniteLoss: training met a NaN.
    """
    args = [find_config(a) if i and args[i - 1] in ("--config", "-c") else a for i, a in enumerate(args)]
    try:
        return RecipeCLI(args, progress)
    except jsonargparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _as_seed(value: bool | int) -> int:
    return int(value) if not isinstance(value, bool) else 0
