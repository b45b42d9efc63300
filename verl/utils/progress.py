"""Progress of anything that may take over five seconds: a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

logger = logging.getLogger(__name__)
T = TypeVar("T")
Unit = Literal["items", "bytes"]
QUIET_S = 5.0
"""Nothing is shown in a log before this long, so that short work stays silent."""
EVERY_S = 10.0
"""Seconds between two lines in a log."""
SIGN_OF_LIFE_S = 60.0
"""Seconds between two lines about work whose length is not known."""


class Progress:
    """Counts up to `total` (None: unknown). A context manager; call `advance` as work is done."""

    def __init__(self, total: float | None, description: str, *, unit: Unit = "items") -> None:
        self.total = total
        self.description = description
        self.done = 0.0
        self._unit = unit
        self._started = time.monotonic()
        self._next_line = self._started + QUIET_S
        self._said_something = False
        self._bar = make_bar(unit) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._said_something and error is None:
            logger.info("%s: done in %.0f s", self.description, time.monotonic() - self._started)

    def advance(self, amount: float = 1) -> None:
        """Counts `amount` more items, or bytes, as done."""
        self.done += amount
        if self._bar is not None:
            self._bar.advance(self._task, amount)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + EVERY_S
            self._said_something = True
            logger.info("%s", self.line())

    def describe(self, description: str) -> None:
        """Changes what stands before the count, such as a rate."""
        self.description = description
        if self._bar is not None:
            self._bar.update(self._task, description=description)

    def line(self) -> str:
        """The state as one line: count, share, seconds spent and seconds left."""
        spent = time.monotonic() - self._started
        if self.total is None:
            return f"{self.description}: {self._amount(self.done)}, {spent:.0f} s"
        left = spent / self.done * (self.total - self.done) if self.done else float("inf")
        share = self.done / self.total if self.total else 1.0
        return (
            f"{self.description}: {self._amount(self.done)} of {self._amount(self.total)} "
            f"({share:.0%}), {spent:.0f} s, about {left:.0f} s left"
        )

    def _amount(self, value: float) -> str:
        return f"{value / 2**30:.2f} GiB" if self._unit == "bytes" else f"{value:g}"


def make_bar(unit: Unit) -> RichProgress:
    """A rich bar on stderr that disappears when it is done."""
    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    return RichProgress(
        TextColumn("{task.description}"), BarColumn(), count,
        TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


@contextmanager
def waiting(description: str) -> Iterator[None]:
    """Shows that work of unknown length goes on: a bar on a terminal, a line a minute in a log."""
    if sys.stderr.isatty():
        with Progress(None, description):
            yield
        return
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(SIGN_OF_LIFE_S):
            logger.info("%s: %.0f s so far", description, time.monotonic() - started)

    threading.Thread(target=tell, name="sign of life", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def progress(items: Iterable[T], description: str, *, total: float | None = None) -> Iterator[T]:
    """Yields `items` and shows how far it is; `total` where the iterable has no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, description) as bar:
        for item in items:
            yield item
            bar.advance()
