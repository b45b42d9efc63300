"""Scores samples with a user's reward function, in processes of its own.

A reward that raises, hangs, or returns something that is not a finite number stops the run with the
sample that caused it: a silent 0 would teach the model the wrong thing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from verl.config import RewardConfig
from verl.workers.reward_process import RewardCall, RewardFault, serve

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 120.0


class RewardError(RuntimeError):
    """A reward function failed; the message holds the sample."""

    @property
    def user_message(self) -> str:
        """What to show without a traceback."""
        return str(self)


@dataclass
class _Child:
    process: BaseProcess
    connection: Connection


class RewardManager:
    """Runs `worker.reward.reward_function` in `num_cpus` processes; a context manager."""

    def __init__(self, config: RewardConfig) -> None:
        path, _, name = config.reward_function.rpartition(":")
        self._call = RewardCall(path, name, config.reward_type, config.reward_function_kwargs)
        self._timeout_s = config.timeout_s
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
        logger.info("reward function %s of %s (sha256 %s)", name, path, digest)
        self._children: list[_Child] = []
        try:
            for _ in range(config.num_cpus):
                self._children.append(self._start())
            for child in self._children:
                fault = self._receive(child, START_TIMEOUT_S, "loading the reward function")
                if fault is not None:
                    raise RewardError(f"{self._where()} cannot be loaded:\n{fault.reason}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RewardManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def score(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
        """Scores by row: `overall` and whatever parts the function returns. Raises RewardError."""
        shares = _split(list(rows), len(self._children))
        busy = [(c, s) for c, s in zip(self._children, shares, strict=True) if s]
        for child, share in busy:
            child.connection.send(share)
        scores: list[dict[str, float]] = []
        for child, share in busy:
            result = self._receive(child, self._timeout_s * len(share), f"{len(share)} samples")
            if isinstance(result, RewardFault):
                self.close()
                row = share[result.row if result.row is not None else 0]
                which = "the sample" if result.row is not None else "the first sample of the batch"
                raise RewardError(f"{self._where()} {result.reason}\n{which}: {_shown(row)}")
            scores.extend(result)
        if any(s.keys() != scores[0].keys() for s in scores):
            parts = sorted({tuple(sorted(s)) for s in scores})
            raise RewardError(f"{self._where()} returned different parts for samples: {parts}")
        return scores

    def close(self) -> None:
        """Ends the processes."""
        for child in self._children:
            child.connection.close()
            child.process.kill()
            child.process.join()
        self._children.clear()

    def _start(self) -> _Child:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self._call), daemon=True)
        process.start()
        theirs.close()
        return _Child(process, ours)

    def _receive(self, child: _Child, limit_s: float, work: str) -> Any:
        deadline = time.monotonic() + limit_s
        while not child.connection.poll(min(1.0, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                self.close()
                raise RewardError(
                    f"{self._where()} took more than {limit_s:.0f} s for {work}; raise "
                    "worker.reward.timeout_s or make it faster"
                )
        try:
            return child.connection.recv()
        except (EOFError, OSError) as error:
            child.process.join(5)
            code = child.process.exitcode
            self.close()
            raise RewardError(f"{self._where()} ended its process (exit code {code})") from error

    def _where(self) -> str:
        return f"worker.reward.reward_function={self._call.path}:{self._call.name}"


def _split(rows: list[dict[str, Any]], n: int) -> list[list[dict[str, Any]]]:
    bounds = [len(rows) * i // n for i in range(n + 1)]
    return [rows[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _shown(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=repr)[:2000]
