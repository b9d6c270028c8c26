"""Runs on two processes of one machine, without an accelerator; forks of the server of `killing`."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from training.checkpoints.killing import fit, server

from tpcompress.training import module

STRATEGIES: dict[str, Any] = {
    "ddp": "ddp_find_unused_parameters_true",
    "fsdp2": {"class_path": "tpcompress.training.distributed.fsdp2.FSDP2"},
    "zero2": {"class_path": "training.distributed.ranks.DeepSpeedOnCPU", "init_args": {"stage": 2}},
    "zero3": {"class_path": "training.distributed.ranks.DeepSpeedOnCPU", "init_args": {"stage": 3}},
}


class DeepSpeedOnCPU(DeepSpeedStrategy):
    """Lightning's DeepSpeed without its refusal of the CPU, and without DeepSpeed's compiled communication."""

    def __init__(self, stage: int) -> None:
        super().__init__(stage=stage, process_group_backend="gloo", exclude_frozen_parameters=True)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed wants a number

    def setup_distributed(self) -> None:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # minutes of a compiler, and its stale lock
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Note(Callback):
    """Writes each rank's losses, the sequences and images of its batches, and its calls of the vision tower."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.rows: list[dict[str, Any]] = []
        self.calls = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def count(*call: Any) -> None:
            self.calls += torch.is_grad_enabled()  # neither the teacher's nor a diagnosis

        pl_module.parts.vision_tower.register_forward_pre_hook(count)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pixels = batch.get("pixel_values")
        row = {"loss": float(outputs["loss"].detach()), "pictures": 0 if pixels is None else len(pixels)}
        row |= {"answers": batch["meta"].num_answers, "calls": self.calls, "rows": batch["meta"].rows}
        self.rows.append(row)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        with deepspeed.zero.GatheredParameters(list(pl_module.model.parameters())):
            whole = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in pl_module.model.named_parameters()}
            whole = {name: value.detach().clone() for name, value in whole.items()}
        torch.save({"steps": self.rows, "weights": whole}, self.folder / f"rank{trainer.global_rank}.pt")


class StopOne(Callback):
    """Sends SIGTERM to one rank, within the backward pass of a step."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)


class AsTwo(Callback):
    """Lets one process that accumulates two batches draw what two ranks draw, each for its batch."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        draw = module.draw_for

        def drawn(seed: int, step: int, batch: int, *rank: int) -> random.Random:
            return draw(seed, step, batch // 2, *(batch % 2 for _ in rank))

        module.draw_for = drawn


def note(folder: Path) -> dict[str, Any]:
    return {"class_path": "training.distributed.ranks.Note", "init_args": {"folder": str(folder)}}


def rank(number: int, world: int, port: int, args: list[str], said: Path) -> None:
    """One process of a run; Lightning finds its place in the environment, as under a launcher."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "LOCAL_RANK": number, "WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in place.items()})
    fit(args, said.with_suffix(f".{number}.txt"))


def on_ranks(args: list[str], said: Path, seconds: int, target: Any = rank, world: int = 2) -> tuple[list[int], str]:
    """Exit codes and words of the processes of a run; -9 for those that had to be ended because they hung."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [server().Process(target=target, args=(n, world, port, args, said)) for n in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    words = [said.with_suffix(f".{n}.txt") for n in range(world)]
    return [p.exitcode for p in processes], "\n".join(path.read_text() for path in words if path.exists())
