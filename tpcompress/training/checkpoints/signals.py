"""SIGTERM and Ctrl-C end a run between two steps, saved, at the same step on all ranks.

Lightning saves on SIGTERM as well, but exits with code 0 and without a message, and its signal handler broadcasts from
any point of the first rank, while the other ranks are in another collective.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a run ended by SIGTERM, as the shell reports it for a process killed by the signal."""


class Stopped(BaseException):
    """The run ends on all ranks at the same step."""


class Terminated(Stopped, SystemExit):
    """SIGTERM was received; the exit code is 143."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.code = TERMINATED


class InterruptedTogether(Stopped, KeyboardInterrupt):
    """Ctrl-C was received in a run on several ranks, or was swallowed by a destructor."""


class Stopping(L.Callback):
    """Ends training at the next optimizer step (or validation batch) after SIGTERM.

    With several ranks, one rank that received the signal is enough, and Ctrl-C is treated alike; a second Ctrl-C ends
    the process at once. With one rank, Ctrl-C acts at once, or at the end of the batch if it was swallowed by a
    destructor, whose exceptions Python ignores.
    """

    def __init__(self) -> None:
        self.received = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handlers. Lightning restores the previous ones after the run."""
        self.received = 0
        if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
            return
        signal.signal(signal.SIGTERM, self._record)
        signal.signal(signal.SIGINT, self._record if trainer.world_size > 1 else self._record_and_raise)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if trainer.world_size == 1 or stepped:
            self._stop(trainer)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *which: int
    ) -> None:
        if trainer.state.fn == "fit" and trainer.world_size == 1:
            self._stop(trainer)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == self.received == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.received = max(self.received, number)

    def _record_and_raise(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, number)
        signal.default_int_handler(number, frame)

    def _stop(self, trainer: L.Trainer) -> None:
        received = self.received
        if trainer.world_size > 1:
            agreed = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(agreed, reduce_op="max"))
        if received == signal.SIGTERM:
            raise Terminated
        if received:
            raise InterruptedTogether
