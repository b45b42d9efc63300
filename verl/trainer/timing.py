"""Wall-clock time of each phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from verl.utils.progress import waiting


class PhaseTimer:
    """Adds up seconds by phase until they are taken; a phase that lasts is shown to the user."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self.title = ""
        """What stands before the phase's name when it is shown, such as `step 3 of 60`."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with waiting(f"{self.title}: {name}" if self.title else name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
