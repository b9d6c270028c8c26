"""Runs a recipe: LightningCLI with the defaults of this package, for Python and for the command line."""

from __future__ import annotations

import json
import logging
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import yaml
from docstring_parser import DocstringStyle
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from tpcompress.bundled import find_config
from tpcompress.errors import read_yaml
from tpcompress.recipe_files import INCLUDE, read_recipe
from tpcompress.training.checkpoints.callback import Checkpoints
from tpcompress.training.checkpoints.read import checkpoint_file, read_checkpoint
from tpcompress.training.checkpoints.signals import Stopping, Terminated
from tpcompress.training.datamodules import benchmark, chat  # noqa: F401  makes their class names known to recipes
from tpcompress.training.diagnostics.callback import Diagnostics
from tpcompress.training.diagnostics.start_report import StartReport
from tpcompress.training.module import PruningModule
from tpcompress.training.recipe.callbacks import callbacks_of_run
from tpcompress.training.recipe.errors import readable
from tpcompress.training.recipe.numbers import integers_first
from tpcompress.training.renamed import check_names

# By default jsonargparse tries every docstring style, which takes most of the time until a run starts.
jsonargparse.set_parsing_settings(docstring_parse_style=DocstringStyle.GOOGLE)

RECIPE = "recipe.yaml"
CONFIG = ("--config", "-c")
log = logging.getLogger(__name__)


class SaveRecipe(SaveConfigCallback):
    """Writes the complete recipe, with all defaults, into the folder of the run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(pl_module, PruningModule):  # for checkpoints, which may be copied without this file
            pl_module.recipe = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        if trainer.is_global_zero and stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(folder / RECIPE), skip_unset=False, overwrite=True, multifile=False)


class RecipeCLI(LightningCLI):
    """`fit` and `validate` with recipes.

    Args:
        args: command-line arguments.
        progress: show a progress bar or progress lines.
        run: False only builds trainer, model and data, from arguments without a subcommand.

    Raises:
        ValueError: a renamed key or class.
    """

    def __init__(self, args: list[str], progress: bool = True, run: bool = True) -> None:
        check_names(args)
        # Docstrings of attributes are parsed from source, two thirds of the time that the parser takes.
        jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=_prints_docstrings(args))
        self.wants_progress = progress
        self.requested = args[0] if run and args else ""
        super().__init__(
            PruningModule,
            L.LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveRecipe,
            trainer_defaults={
                "default_root_dir": "runs/fit",
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "prog": "tpcompress"},
            args=args,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # building one parser per subcommand is slow
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name == self.requested}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        integers_first(parser)
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(Diagnostics, "diagnostics")
        # One seed for everything that is drawn, so recipes set `seed_everything` only.
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_as_seed)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_as_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(_with_includes(args))  # Lightning's version warns about sys.argv

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        config["callbacks"] = callbacks_of_run(config, callbacks, self.wants_progress)
        return super()._instantiate_trainer(config, [Stopping(), StartReport()])

    def _parse_ckpt_path(self) -> None:
        """Find and check the checkpoint first. Lightning's version replaces settings of the recipe by those in it."""
        config: Any = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        path = config.get("ckpt_path")
        if path is not None:
            found = checkpoint_file(config.trainer.default_root_dir if path == "last" else path)
            read_checkpoint(found)
            config.ckpt_path = str(found)

    def _run_subcommand(self, subcommand: str) -> None:
        handler = signal.getsignal(signal.SIGINT)
        try:
            super()._run_subcommand(subcommand)
        except Terminated as stop:
            if not self.trainer.is_global_zero:  # Lightning kills the other ranks after a failed one
                raise SystemExit(0) from stop
            log.warning("%s", message := _how_to_resume(self.trainer, "Terminated"))
            raise Terminated(message) from stop
        except SystemExit as stop:
            if not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            # On Ctrl-C Lightning exits the process and ignores further signals.
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt(_how_to_resume(self.trainer)) from stop


def run_recipe(
    args: list[str], progress: bool = True, run: Callable[[list[str], bool], RecipeCLI] | None = None
) -> RecipeCLI:
    """Run `fit` or `validate` with command-line arguments, e.g. ["fit", "--config", "recipes/..."].

    Args:
        args: command-line arguments.
        progress: show a progress bar or progress lines.
        run: class or function that runs them; None for `RecipeCLI`.

    Raises:
        FileNotFoundError: the recipe or the checkpoint does not exist.
        ValueError: a wrong key or value in the recipe.
        NonFiniteLoss: the loss or the gradient became NaN or infinite.
        KeyboardInterrupt: interrupted; the message contains the command that resumes.
        Terminated: ended by SIGTERM, with the same message; uncaught, it exits the process with code 143.
        CheckpointNotSaved: a checkpoint could not be written; the previous one is intact.
    """
    if not args or args[0] not in ("fit", "validate"):
        raise ValueError(f"Commands of a recipe are fit and validate, got {args[0] if args else 'nothing'!r}.")
    args = [find_config(a) if i and args[i - 1] in CONFIG else a for i, a in enumerate(args)]
    try:
        return (run or RecipeCLI)(args, progress)
    except jsonargparse.ArgumentError as error:
        raise ValueError(readable(error)) from error
    except ValueError as error:
        if "Does not validate" not in str(error):
            raise
        raise ValueError(readable(error)) from error  # a class rejected its arguments


def _with_includes(args: list[str]) -> list[str]:
    """The arguments, with the settings of every recipe that includes others instead of its path."""
    found = []
    for number, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        is_path = (name in CONFIG and equals) or (number and args[number - 1] in CONFIG)
        path = value if equals and is_path else argument
        if is_path and Path(path).is_file() and INCLUDE in (read_yaml(path) or ()):
            path = json.dumps(read_recipe(path))
        found.append(f"{name}={path}" if equals and is_path else path)
    return found


def _prints_docstrings(args: list[str]) -> bool:
    """Whether the command prints the help of keys: --help, --model.help, --print_config=comments."""
    return any(arg == "-h" or "help" in arg or arg.startswith("--print") for arg in args)


def _as_seed(value: bool | int) -> int:
    return int(value) if not isinstance(value, bool) else 0


def _how_to_resume(trainer: L.Trainer, what: str = "Interrupted") -> str:
    last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    if not last.exists():
        return f"{what} before the first checkpoint; run the same command again."
    return f"{what}; resume with the same command and --ckpt_path {shlex.quote(str(last))}."
