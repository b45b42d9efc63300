"""What goes wrong in a worker, and which of several failures was the cause."""

from __future__ import annotations

import pickle
import re
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import OutOfMemoryError, RayActorError, RayError

from verl.utils.exits import Explained

SECONDS_TO_EXPLAIN = 5.0
"""How long a broken collective waits for the death of a peer that would explain it."""
_BROKEN_COLLECTIVE = re.compile(
    r"gloo|nccl|Connection (closed|reset)|unbound_buffer|TCPStore|Timed out waiting", re.IGNORECASE
)


class WorkerDied(Explained, RuntimeError):
    """A worker process ended, or raised something that cannot be passed on as it is.

    The whole group is gone by the time this is raised: the others cannot finish a collective
    without the missing rank.
    """

    def __init__(self, rank: int, method: str, reason: str) -> None:
        super().__init__(rank, method, reason)
        self.rank = rank
        self.method = method
        self.reason = reason

    def __str__(self) -> str:
        return f"Worker rank {self.rank} died in {self.method}(): {self.reason}"


@dataclass(frozen=True)
class Failure:
    """What a worker method raised, in a form that always crosses process borders."""

    error: BaseException | None
    """The exception; None when it cannot be pickled."""
    summary: str
    """Type and message."""
    trace: str
    """Traceback in the worker, as text."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describes an exception that has just been caught."""
        trace = "".join(traceback.format_exception(error))
        return cls(_if_picklable(error), f"{type(error).__name__}: {error}", trace)

    def exception(self, rank: int, method: str) -> BaseException:
        """The original exception, with rank and traceback as notes."""
        error = self.error
        if error is None:
            error = WorkerDied(rank, method, self.summary)
        else:
            error.add_note(f"Raised by worker rank {rank} in {method}().")
        error.add_note(self.trace)
        return error


@dataclass(frozen=True)
class Died:
    """The process of a worker is gone."""

    error: RayError

    def exception(self, rank: int, method: str) -> BaseException:
        """What to raise for it."""
        died = WorkerDied(rank, method, _reason(self.error))
        died.__cause__ = self.error
        return died


def outcome(ref: ObjectRef) -> Any:
    """The result of a finished call, or what went wrong with it."""
    try:
        return ray.get(ref)
    except RayError as error:
        return Died(error)


def failed(value: Any) -> bool:
    """Whether an outcome is not a result."""
    return isinstance(value, Died | Failure)


def explain(
    rank: int, failure: Died | Failure, pending: Mapping[ObjectRef, int]
) -> tuple[int, Died | Failure]:
    """Rank and failure to report: not a broken collective if the peer that broke it can be found.

    The ranks that were left waiting notice a death sooner than Ray does.
    """
    others = dict(pending)
    deadline = time.monotonic() + SECONDS_TO_EXPLAIN
    while _is_consequence(failure) and others and time.monotonic() < deadline:
        ready, _ = ray.wait(list(others), num_returns=1, timeout=deadline - time.monotonic())
        for ref in ready:
            other, found = others.pop(ref), outcome(ref)
            if failed(found) and not _is_consequence(found):
                return other, found
    return rank, failure


def _is_consequence(failure: Died | Failure) -> bool:
    return isinstance(failure, Failure) and bool(_BROKEN_COLLECTIVE.search(failure.summary))


def _reason(error: RayError) -> str:
    """Ray's words without colours, identifiers and repeated advice."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if isinstance(error, OutOfMemoryError):
        return _out_of_memory(text)
    if not isinstance(error, RayActorError):
        return text
    process = re.search(r"\bpid: (\d+)", text)
    name = f"process {process[1]}" if process else "its process"
    if "connection error code 2" in text:
        return (
            f"{name} was killed or crashed. Most often the host ran out of memory; "
            "`dmesg | grep -i kill` tells."
        )
    detail = re.search(r"Worker exit detail: (.*)", text)
    return f"{name}: {detail[1] if detail else text}"


def _out_of_memory(text: str) -> str:
    used = re.search(r"was (\S+ used / \S+ limit)", text)
    largest = re.findall(r"^\d+\t([\d.]+)\t(.*)$", text, re.MULTILINE)[:3]
    processes = ", ".join(f"{command} {gigabytes} GB" for gigabytes, command in largest)
    return (
        f"host memory ran out ({used[1] if used else 'see the log of the raylet'}). Largest "
        f"processes: {processes}. Use fewer workers a machine, smaller batches or less prefetch."
    )


def _if_picklable(error: BaseException) -> BaseException | None:
    # Anything can go wrong here: pickling calls whatever the class of the exception defines.
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return error if type(copy) is type(error) and str(copy) == str(error) else None
