"""Processes that encode media, and what becomes of the media when one of them dies.

The parent hands out single pieces of media, so that it knows who works on what. What a process held
when it died is tried once more, each file alone in a process: one on which that dies, too, is lost.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, cast

import torch

from verl.data.media import MediaItem
from verl.data.media_files import REMEDIES
from verl.utils.exits import UserError
from verl.workers.offline_encode import Answer, Failed, Fatal, Made, OfflineJob, Ready, serve

logger = logging.getLogger(__name__)
_SECONDS_TO_END = 30.0
_REMEDY = (
    f"{REMEDIES['crashed']}; SIGKILL may mean that the machine ran out of memory: then give fewer "
    "--num_workers"
)


@dataclass
class _Child:
    process: BaseProcess
    pipe: Connection
    index: int
    is_ready: bool = False
    is_alone: bool = False
    """Works on a piece of media that a process died with, and gets no other beside it."""
    working_on: dict[int, int] = field(default_factory=dict)
    """Bytes of decoded frames, by number of the piece."""


class OfflinePool:
    """A process for each of `devices`; a context manager, at whose end they are gone."""

    def __init__(self, job: OfflineJob, devices: Sequence[str], ahead_bytes: int) -> None:
        """`ahead_bytes`: decoded frames in the memory of one process; one larger video passes."""
        self._job = job
        self._devices = list(devices)
        self._ahead_bytes = ahead_bytes
        self._context = multiprocessing.get_context("spawn")
        self._children: list[_Child] = []
        self._items: Sequence[MediaItem] = ()
        self._todo: deque[int] = deque()
        self._suspects: deque[int] = deque()
        self._tried_alone: set[int] = set()
        self.ready_at: float | None = None
        """When the first process was ready, by `time.monotonic`."""

    def __enter__(self) -> OfflinePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self._children:
            if error is not None or child.working_on or not _tell(child, None):
                child.process.terminate()
        for child in self._children:
            child.process.join(_SECONDS_TO_END)
            if child.process.is_alive():
                child.process.kill()
                child.process.join()

    def run(self, items: Sequence[MediaItem]) -> Iterator[tuple[MediaItem, Made | Failed]]:
        """Encodes media and gives the answer to each, in any order.

        Raises UserError where no process can work at all.
        """
        self._items, self._todo = items, deque(range(len(items)))
        self._children = [self._started(i) for i in range(min(len(items), len(self._devices)))]
        n_open = len(items)
        while n_open:
            for child in self._children:
                self._feed(child)
            by_pipe = {child.pipe: child for child in self._children}
            for pipe in wait(list(by_pipe)):
                for answer in self._heard(by_pipe[cast(Connection, pipe)]):
                    n_open -= 1
                    yield items[answer.number], answer

    def _started(self, index: int) -> _Child:
        pipe, theirs = self._context.Pipe()
        # On a CPU, processes share the cores.
        threads = max(1, torch.get_num_threads() // len(self._devices))
        arguments = (self._job, index, self._devices[index], threads, theirs)
        process = self._context.Process(
            target=serve, args=arguments, name=f"encode-{index}", daemon=True
        )
        # Ctrl-C goes to all processes of a terminal. The new one inherits that it is held back, and
        # ignores it once it runs (`serve`): while it imports, it would die with a traceback.
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        theirs.close()  # so that the end of the process ends the pipe
        return _Child(process, pipe, index)

    def _feed(self, child: _Child) -> None:
        """Gives a process as much as it may hold: one file at work, others decoded ahead."""
        while child.is_ready and not (child.is_alone and child.working_on):
            child.is_alone = bool(self._suspects)
            queue = self._suspects or self._todo
            if not queue or (child.is_alone and child.working_on):
                return
            n_bytes = _frame_bytes(self._items[queue[0]])
            held = sum(child.working_on.values())
            too_many = len(child.working_on) >= self._job.threads + 2
            if child.working_on and (too_many or held + n_bytes > self._ahead_bytes):
                return
            number = queue.popleft()
            if child.is_alone:
                self._tried_alone.add(number)
            child.working_on[number] = n_bytes
            if not _tell(child, (number, self._items[number])):
                return  # It died: that is heard next.

    def _heard(self, child: _Child) -> list[Made | Failed]:
        try:
            answer: Answer = child.pipe.recv()
        except (EOFError, OSError):
            return self._died(child)
        if isinstance(answer, Fatal):
            raise UserError(answer.message)
        if isinstance(answer, Ready):
            child.is_ready = True
            self.ready_at = self.ready_at or time.monotonic()
            return []
        del child.working_on[answer.number]
        return [answer]

    def _died(self, child: _Child) -> list[Made | Failed]:
        child.process.join()
        child.pipe.close()
        how = _how(child.process.exitcode)
        if not child.is_ready:
            raise UserError(f"a process that encodes {how} before it was ready; see above for why")
        suspects = [number for number in child.working_on if number not in self._tried_alone]
        if suspects:
            logger.warning(
                "a process that encodes %s: trying its %d files once more, each alone",
                how, len(suspects),
            )  # fmt: skip
            self._suspects.extend(suspects)
        lost = [number for number in child.working_on if number in self._tried_alone]
        detail = f"the process that worked on it {how}, also when it had no other file; {_REMEDY}"
        failed: list[Made | Failed] = [Failed(number, "crashed", detail) for number in lost]
        self._children.remove(child)
        if self._todo or self._suspects:
            self._children.append(self._started(child.index))
        return failed


def _tell(child: _Child, message: Any) -> bool:
    """Sends to a process; False where it is dead."""
    try:
        child.pipe.send(message)
    except OSError:
        return False
    return True


def _frame_bytes(item: MediaItem) -> int:
    t, h, w = item.grid_thw
    rule = item.ref.resize
    return 3 * t * rule.temporal_patch_size * h * w * rule.patch_size**2


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was ended by {signal.Signals(-exitcode).name}"
    return f"ended with code {exitcode}"
