"""Memory of an export: the peak of a process above its start, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from functools import cache
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")

SMALL = 100_000_000
"""Bytes of weights from which the peak is compared with them."""


class PeakMemory:
    """Highest resident memory of this process above what it had when the object was made, in bytes.

    On a device with memory of its own, torch's peak there is added.
    """

    def __init__(self) -> None:
        import torch

        gc.collect()
        self.start = _status("VmRSS")
        self.reset = _reset_peak()
        self.before = _status("VmHWM")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def above_start(self) -> int | None:
        """Bytes; None where the system does not tell, or the peak lies before the start."""
        import torch

        peak = _status("VmHWM")
        if self.start is None or peak is None or not (self.reset or peak != self.before):
            return None
        on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return peak - self.start + on_device

    def line(self, model_bytes: int) -> str | None:
        """`peak memory 16.2 GB, 1.08 x the model`; None where the system does not tell.

        Without the ratio for a model below `SMALL`, where the peak is that of the libraries.

        Args:
            model_bytes: size of the written weights.
        """
        above = self.above_start
        if above is None:
            return None
        ratio = f", {above / model_bytes:.2f} x the model" if model_bytes >= SMALL else " (a small model)"
        return f"peak memory {above / 1e9:.1f} GB{ratio}"


def weight_bytes(folder: Path) -> int:
    """Size of the weight files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def return_freed() -> None:
    """Return freed memory to the system.

    The allocator of glibc keeps the space of freed tensors up to 32 MB; between copies of different sizes it grows by
    a quarter of the model. Elsewhere this does nothing.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _status(key: str) -> int | None:
    """A line of /proc/self/status in bytes; None outside Linux."""
    if not STATUS.is_file():
        return None
    lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _reset_peak() -> bool:
    """Set the recorded peak of this process to what it has now, as far as the system lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
