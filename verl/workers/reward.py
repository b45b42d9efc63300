"""Scores samples with a user's reward function, in processes of its own.

A reward that raises, hangs, or returns something that is not a finite number stops the run with the
sample that caused it: a silent 0 would teach the model the wrong thing. The processes end with the
run, also when it is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from verl.config import RewardConfig
from verl.utils.exits import Explained
from verl.workers.reward_process import RewardCall, RewardFault, Started

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0
Row = dict[str, Any]


class RewardError(Explained, RuntimeError):
    """A reward function failed; the message holds the function and the sample."""


class RewardManager:
    """Runs `worker.reward.reward_function` in processes of its own; a context manager.

    A sequential function gets `num_cpus` of them. A batch function gets one, which sees all samples
    of a call together, so that it may compare them.

    To be made in the thread that outlives it: the kernel ends the processes with that thread.
    Raises RewardError when the function cannot be loaded.
    """

    def __init__(self, config: RewardConfig) -> None:
        path, _, name = config.reward_function.rpartition(":")
        self._call = RewardCall(path, name, config.reward_type, config.reward_function_kwargs)
        self._timeout_s = config.timeout_s
        self._children: list[_Child] = []
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
        except OSError as error:
            raise RewardError(f"{self._where} cannot be read: {error}") from error
        logger.info("reward function %s of %s (sha256 %s)", name, path, digest)
        try:
            for _ in range(config.num_cpus):
                self._children.append(_Child(self._call))
            self._gather(START_TIMEOUT_S, "loading")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def score(self, rows: Sequence[Row]) -> list[dict[str, float]]:
        """Scores by row: `overall` and whatever parts the function returns.

        Raises RewardError, also when the function takes longer than `timeout_s` for one sample
        (sequential) or for all of `rows` (batch).
        """
        if not self._children:
            raise RewardError(f"{self._where} is closed, after an earlier error or by close()")
        bounds = [len(rows) * i // len(self._children) for i in range(len(self._children) + 1)]
        try:
            for child, (start, end) in zip(self._children, pairwise(bounds), strict=True):
                child.begin(list(rows[start:end]))
            self._gather(self._timeout_s, "scoring")
        except BaseException:
            self.close()  # an answer that arrives later must not be taken for the next batch's
            raise
        scores = [score for child in self._children for score in child.scores]
        for row, score in zip(rows, scores, strict=True):
            if score.keys() != scores[0].keys():
                raise RewardError(
                    f"{self._where} returned the parts {sorted(score)} for one sample and "
                    f"{sorted(scores[0])} for another; return the same for all.\n"
                    f"the sample: {_shown(row)}"
                )
        return scores

    def close(self) -> None:
        """Ends the processes, and those that they started."""
        for child in self._children:
            child.kill()
        self._children = []

    @property
    def _where(self) -> str:
        return f"worker.reward.reward_function={self._call.path}:{self._call.name}"

    def _gather(self, limit_s: float, work: str) -> None:
        """Waits for all busy children; each of their messages starts the child's limit afresh."""
        busy = {child.connection: child for child in self._children if child.busy}
        while busy:
            first = min(child.heard_at for child in busy.values()) + limit_s
            ready = wait(list(busy), max(0.0, first - time.monotonic()))
            now = time.monotonic()
            for child in busy.values():
                if child.connection not in ready and now - child.heard_at >= limit_s:
                    self._fail(child, f"took more than {self._limit(work)}")
            for connection in ready:
                assert isinstance(connection, Connection)  # nothing else is waited for
                child = busy[connection]
                try:
                    child.take(connection.recv())
                except (EOFError, OSError):
                    self._fail(child, f"ended its process while {work} ({child.exit_reason()})")
                if child.fault is not None:
                    self._fail(child, child.fault.reason)
                if not child.busy:
                    del busy[connection]

    def _limit(self, work: str) -> str:
        if work == "loading":
            return f"{START_TIMEOUT_S:g} s for loading"
        scope = "sample" if self._call.kind == "sequential" else "batch"
        return f"worker.reward.timeout_s={self._timeout_s:g} for a {scope}; raise it"

    def _fail(self, child: _Child, what: str) -> NoReturn:
        raise RewardError(f"{self._where} {what}{child.sample()}")


class _Child:
    """A process and what it is working on; busy from the start, until it has loaded."""

    def __init__(self, call: RewardCall) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.busy = True
        self.heard_at = time.monotonic()
        """When it was given its work, or last sent a message about it."""
        self.scores: list[dict[str, float]] = []
        self.fault: RewardFault | None = None
        self._rows: list[Row] = []
        self._row: int | None = None
        # Not multiprocessing.Process: that would import the caller's main module, with torch and
        # Ray, and forbid the function to start processes.
        code = "from verl.workers.reward_process import main; "
        code += f"main({theirs.fileno()}, {os.getpid()})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": _python_path()},
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self._send(call)

    def begin(self, rows: list[Row]) -> None:
        """Starts on rows; ready at once when there are none."""
        self._rows, self._row, self.scores = rows, None, []
        self.busy = bool(rows)
        if rows:
            self._send(rows)
        self.heard_at = time.monotonic()

    def take(self, message: Any) -> None:
        """Notes a message of the process."""
        self.heard_at = time.monotonic()
        if isinstance(message, Started):
            self._row = message.row
            return
        self.busy = False
        if isinstance(message, RewardFault):
            self._row = message.row
            self.fault = message
        else:
            self.scores = message or []

    def sample(self) -> str:
        """The sample at fault, or the first of a batch, for messages; empty while loading."""
        if not self._rows:
            return ""
        if self._row is not None:
            return f"\nthe sample: {_shown(self._rows[self._row])}"
        return f"\nthe first of {len(self._rows)} samples: {_shown(self._rows[0])}"

    def exit_reason(self) -> str:
        """Exit code of a process that has ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        code = self._process.returncode
        if code is None or code >= 0:
            return f"exit code {code}"
        hint = ", out of memory?" if code == -signal.SIGKILL else ""
        return f"{signal.Signals(-code).name}{hint}"

    def kill(self) -> None:
        """Ends the process and its own children."""
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, message: Any) -> None:
        # A process that has ended is told by its closed pipe, when its answer is waited for.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(message)


def _python_path() -> str:
    """Where the process finds this package, also where it is not installed."""
    outer = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(Path(__file__).parents[2]), *([outer] if outer else [])])


def _shown(row: Row) -> str:
    short = {
        k: v if not isinstance(v, str) or len(v) < 800 else v[:800] + "..." for k, v in row.items()
    }
    return json.dumps(short, ensure_ascii=False, default=repr)[:4000]
