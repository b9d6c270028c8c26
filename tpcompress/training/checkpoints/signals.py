"""SIGTERM and Ctrl-C end a run between two steps: saved, on all processes at the same step, with a word how to go on.

Lightning saves on SIGTERM as well, but leaves with exit code 0 and no word; and its signal handler broadcasts from
wherever the first process is, which meets the other processes within another collective.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L
import torch

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a run that SIGTERM ended: that of the shell for a process that the signal killed."""


class Stopped(BaseException):
    """The run ends on all processes at the same step."""


class Terminated(Stopped, SystemExit):
    """SIGTERM came; its exit code is 143."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.code = TERMINATED


class InterruptedTogether(Stopped, KeyboardInterrupt):
    """Ctrl-C came, in a run of several processes, or was lost to a destructor."""


class Stopping(L.Callback):
    """Ends training at the next optimizer step (or batch of validation) after SIGTERM.

    In a run of several processes it is enough that one got the signal, and Ctrl-C is treated alike; a second Ctrl-C
    ends the process at once. In a run of one process Ctrl-C acts at once, as everywhere; and at the end of the batch if
    Python lost it, as it does in destructors.
    """

    def __init__(self) -> None:
        self.came = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handlers; it puts back the earlier ones itself when the run is over."""
        self.came = 0
        if threading.current_thread() is not threading.main_thread():  # Python takes no signals elsewhere
            return
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note if trainer.world_size > 1 else self._note_and_raise)

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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.came == signal.SIGINT:
            signal.default_int_handler(number, frame)
        self.came = max(self.came, number)

    def _note_and_raise(self, number: int, frame: FrameType | None) -> None:
        self.came = max(self.came, number)
        signal.default_int_handler(number, frame)

    def _stop(self, trainer: L.Trainer) -> None:
        came = self.came
        if trainer.world_size > 1:
            agreed = torch.tensor(came, device=trainer.strategy.root_device)
            came = int(trainer.strategy.reduce(agreed, reduce_op="max"))
        if came == signal.SIGTERM:
            raise Terminated
        if came:
            raise InterruptedTogether
