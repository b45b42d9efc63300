"""Peak memory of a device: of a block of code, and of everything since it was last asked for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PeakMemory:
    """Bytes that torch allocated at most; 0 on a CPU, where torch does not count them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self._asleep = 0
        self.of_block = 0
        """Of the last block that was measured."""

    @contextmanager
    def block(self) -> Iterator[None]:
        """Measures what runs in it by itself."""
        self._lap()
        yield
        self.of_block = self._now()

    def take(self) -> int:
        """Since the last call."""
        peak = max(self._before, self._now())
        self._before = 0
        self._reset()
        return peak

    def sleeping(self, n_bytes: int) -> None:
        """From now on, so much of what torch counts as allocated takes no memory."""
        self._lap()
        self._asleep = n_bytes

    def _lap(self) -> None:
        self._before = max(self._before, self._now())
        self._reset()

    def _now(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.max_memory_allocated(self._device) - self._asleep

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)


def smallest_gpu_bytes() -> int | None:
    """Memory of this machine's smallest GPU; None where the driver's tool does not say.

    By a program, since torch would take up memory of the GPU in the process that asks.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout
        return min(int(line) for line in text.split()) * 2**20
    except (subprocess.SubprocessError, OSError, ValueError):
        return None
