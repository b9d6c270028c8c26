"""Runs in processes of their own that are killed, told to stop, or have no room on the disk.

One server process imports everything once; every run is a fork of it, so that a kill costs no import.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from tpcompress.cli.main import main
from tpcompress.training.checkpoints import storage as durable

SAVING = ("half", "written", "renamed")
"""Moments of a save: half of the file is on the disk, all of it is, it has its name."""


class Kill(Callback):
    """Kills its process with SIGKILL (or sends another signal) at a batch counted from 0, or within the n-th save.

    Args:
        batch: which batch, or which save.
        where: `start`, `backward`, `optimizer`, `step`, `end` or `validation` of the batch; or one of `SAVING`.
        number: of the signal.
    """

    def __init__(self, batch: int, where: str = "end", number: int = int(signal.SIGKILL)) -> None:
        self.batch, self.where, self.number = batch, where, number
        self.count, self.saves = -1, -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._at("step"))
        if self.where in SAVING:
            self._watch_saves()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.count += 1
        self._at("start")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._at("backward")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._at("optimizer")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._at("end")

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        self._at("validation")

    def _at(self, where: str) -> None:
        if where == self.where and self.count >= self.batch:  # not every batch has every place
            os.kill(os.getpid(), self.number)

    def _watch_saves(self) -> None:
        save, place = torch.save, durable.replace_atomically

        def half(value: Any, file: Any) -> None:
            self.saves += 1
            save(value, file)
            if self.where == "half" and self.saves == self.batch:
                file.truncate(file.tell() // 2)
                file.flush()
                os.kill(os.getpid(), self.number)

        def placed(path: Path) -> None:
            if self.where == "written" and self.saves == self.batch:
                os.kill(os.getpid(), self.number)
            place(path)
            if self.where == "renamed" and self.saves == self.batch:
                os.kill(os.getpid(), self.number)

        torch.save, durable.replace_atomically = half, placed


class Room(Callback):
    """From the given batch on no file can grow beyond so many bytes, as on a full disk."""

    def __init__(self, batch: int, size: int) -> None:
        self.batch, self.size = batch, size

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.batch:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def callback(cls: type, **arguments: Any) -> dict[str, Any]:
    """A callback of this file as recipes name it."""
    return {"class_path": f"training.checkpoints.killing.{cls.__name__}", "init_args": arguments}


def fit(args: list[str], said: Path) -> None:
    """`tpcompress fit` in this process, its words into a file."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background job of a shell ignores
        code = 1
        try:
            code = main(["fit", *args])
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_process(function: Callable, *args: Any, seconds: int = 180) -> int:
    """Run a function in a process of its own and wait for its exit code (minus the signal that killed it)."""
    process = server().Process(target=function, args=args)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"The run took more than {seconds} seconds.")
    return process.exitcode


def server() -> Any:
    """What forks the runs. Until Python 3.13 it imports nothing from our path unless the environment says so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.checkpoints.killing", "training.helpers"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        os.environ.update({} if before is None else {"PYTHONPATH": before})
    return context
