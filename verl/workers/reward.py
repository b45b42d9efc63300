"""Scores samples with a user's reward function, in processes of its own.

A reward that raises, hangs, or returns something that is not a finite number stops the run with the
sample that caused it: a silent 0 would teach the model the wrong thing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import verl
from verl.config import RewardConfig
from verl.utils.exits import Explained
from verl.workers.reward_process import RewardCall, RewardFault

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
"""Longest time in seconds that loading the file of a reward function may take."""
_CHILD = "from verl.workers.reward_process import main; main({descriptor}, {parent})"
_SHOWN_CHARACTERS = 4000


class RewardError(Explained, RuntimeError):
    """A reward function failed; the message holds the sample."""


class RewardManager:
    """Runs `worker.reward.reward_function` in `num_cpus` processes; a context manager.

    The processes end with this one, and with the thread that made the manager.
    Raises RewardError when the function cannot be loaded.
    """

    def __init__(self, config: RewardConfig) -> None:
        path, _, name = config.reward_function.rpartition(":")
        self._setting = f"worker.reward.reward_function={config.reward_function}"
        self._timeout_s = config.timeout_s
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
        logger.info("reward function %s of %s (sha256 %s)", name, Path(path).resolve(), digest)
        call = RewardCall(path, name, config.reward_type, config.reward_function_kwargs)
        self._children: list[_Child] = []
        try:
            self._children.extend(_Child.start() for _ in range(config.num_cpus))
            for child in self._children:
                child.send(call)
            self._answers(self._children, START_TIMEOUT_S, "to load")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def score(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
        """Scores by row: `overall` and whatever parts the function returns, the same in each.

        Every process takes neighbouring rows. Raises RewardError, after which the manager is
        closed, when the function raises, exits, returns anything but finite numbers, or takes
        longer than `timeout_s`.
        """
        if not self._children:
            raise RuntimeError("the reward manager is closed")
        try:
            busy = []
            for child, share in zip(self._children, _split(rows, len(self._children)), strict=True):
                if share:
                    child.rows, child.row = share, None
                    child.send(share)
                    busy.append(child)
            hint = f"for {len(rows)} samples; make it faster or raise worker.reward.timeout_s"
            answers = self._answers(busy, self._timeout_s, hint)
            scores = [score for answer in answers for score in answer]
            self._require_same_parts(rows, scores)
        except BaseException:
            self.close()
            raise
        return scores

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        for child in self._children:
            child.end()
        self._children.clear()

    def _answers(self, children: Sequence[_Child], limit_s: float, work: str) -> list[Any]:
        """What each of the children answers, once all have."""
        deadline = time.monotonic() + limit_s
        answers: dict[int, Any] = {}
        waiting = {child.process.pid: child for child in children}
        while waiting:
            connections = [child.connection for child in waiting.values()]
            ready = wait(connections, max(0.0, deadline - time.monotonic()))
            if not ready:
                child = next(iter(waiting.values()))
                raise self._error(
                    child, RewardFault(child.row, f"took more than {limit_s:g} s {work}")
                )
            for pid, child in list(waiting.items()):
                if child.connection not in ready:
                    continue
                answer = child.receive()
                if isinstance(answer, RewardFault):
                    raise self._error(child, answer)
                if isinstance(answer, int):
                    child.row = answer
                else:
                    answers[pid] = answer
                    del waiting[pid]
        return [answers[child.process.pid] for child in children]

    def _error(self, child: _Child, fault: RewardFault) -> RewardError:
        text = f"{self._setting} {fault.reason.rstrip()}"
        if child.rows:
            which = "the sample" if fault.row is not None else f"the first of {len(child.rows)}"
            text += f"\n{which}: {_shown(child.rows[fault.row or 0])}"
        return RewardError(text)

    def _require_same_parts(
        self, rows: Sequence[dict[str, Any]], scores: Sequence[dict[str, float]]
    ) -> None:
        """A mean over samples of which some lack a part would not mean what its name says."""
        for row, score in zip(rows, scores, strict=True):
            if score.keys() != scores[0].keys():
                raise RewardError(
                    f"{self._setting} returned the parts {sorted(scores[0])} for the first sample "
                    f"and {sorted(score)} for this one: {_shown(row)}"
                )


@dataclass
class _Child:
    """A process that scores, and what it is scoring."""

    process: subprocess.Popen[bytes]
    connection: Connection
    rows: list[dict[str, Any]] = field(default_factory=list)
    row: int | None = None
    """The row in progress, where it is known."""

    @classmethod
    def start(cls) -> _Child:
        """A fresh interpreter: it imports neither torch nor what the main script imports."""
        ours, theirs = Pipe()
        root = str(Path(verl.__file__).resolve().parents[1])
        python_path = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    _CHILD.format(descriptor=theirs.fileno(), parent=os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(python_path)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the parent to handle
            )
        return cls(process, ours)

    def send(self, message: Any) -> None:
        """A process that is gone is noticed when its answer is read."""
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            logger.debug("the reward process %d is gone", self.process.pid)

    def receive(self) -> Any:
        """The next message, or a fault when the process is gone."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            return RewardFault(self.row, f"ended its process (exit code {self.process.returncode})")

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def _split(rows: Sequence[dict[str, Any]], n: int) -> list[list[dict[str, Any]]]:
    bounds = [len(rows) * i // n for i in range(n + 1)]
    return [list(rows[a:b]) for a, b in pairwise(bounds)]


def _shown(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]} ..."
