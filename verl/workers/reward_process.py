"""A child process that runs a reward function. Imports no torch, so that it starts in a moment."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RewardCall:
    """Which function to call and how."""

    path: str
    name: str
    kind: str
    """batch: list of samples -> list of scores; sequential: sample -> score."""
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class RewardFault:
    """Why a score could not be used, and for which row; None means the batch as a whole."""

    row: int | None
    reason: str


@dataclass(frozen=True)
class Started:
    """Sent before each sample of a sequential function: its limit starts, and a hang has a name."""

    row: int


def main(descriptor: int, parent: int) -> None:
    """Entry point of the process: serves the pipe end `descriptor`, dies with `parent`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        sys.exit(1)
    connection: Connection = Connection(descriptor)
    serve(connection, connection.recv())


def serve(connection: Connection, call: RewardCall) -> None:
    """Scores lists of rows until the pipe closes."""
    try:
        function = load_function(call)
    except Exception as error:
        connection.send(RewardFault(None, _explained(error)))
        return
    connection.send(None)
    while True:
        try:
            rows = connection.recv()
        except EOFError:
            return
        connection.send(score_rows(function, rows, call, lambda i: connection.send(Started(i))))


def load_function(call: RewardCall) -> Callable[..., Any]:
    """The function that `call` names; its file is executed.

    Raises whatever the file raises, AttributeError when it lacks the function, and TypeError when
    the function cannot take one argument and the configured keywords.
    """
    module = _module(Path(call.path))
    function = getattr(module, call.name, None)
    if not callable(function):
        names = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise AttributeError(f"{call.path} has no function {call.name!r}; it has {names}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C do not tell
        return function
    try:
        signature.bind([], **call.kwargs)
    except TypeError as error:
        raise TypeError(
            f"{call.name}{signature} cannot be called with the samples and "
            f"worker.reward.reward_function_kwargs={dict(call.kwargs)}: {error}"
        ) from None
    return function


def score_rows(
    function: Callable[..., Any],
    rows: Sequence[dict[str, Any]],
    call: RewardCall,
    started: Callable[[int], None],
) -> list[dict[str, float]] | RewardFault:
    """Checked scores of all rows, or the first fault."""
    scores: Sequence[Any]
    if call.kind == "batch":
        try:
            scores = function(list(rows), **call.kwargs)
        except Exception as error:
            return RewardFault(None, _explained(error))
        if not isinstance(scores, list | tuple):
            kind = type(scores).__name__
            return RewardFault(None, f"returned a {kind} for {len(rows)} samples, not a list")
        if len(scores) != len(rows):
            return RewardFault(None, f"returned {len(scores)} scores for {len(rows)} samples")
    else:
        scores = []
        for i, row in enumerate(rows):
            started(i)
            try:
                scores.append(function(row, **call.kwargs))
            except Exception as error:
                return RewardFault(i, _explained(error))
    checked = []
    for i, score in enumerate(scores):
        parts = score if isinstance(score, Mapping) else {"overall": score}
        if "overall" not in parts:
            return RewardFault(i, f"returned {dict(parts)!r}, which has no 'overall'")
        try:
            checked.append({str(k): _number(v) for k, v in parts.items()})
        except ValueError as error:
            return RewardFault(i, f"returned {dict(parts)!r:.1000}; {error}")
    return checked


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _number(value: Any) -> float:
    """A finite float. Raises ValueError for anything else; a truth value is no score either."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{value!r:.100} is a {type(value).__name__} and not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{value!r:.100} is not finite")
    return number


def _explained(error: Exception) -> str:
    """Message and place of an exception, without this file's own frames."""
    frames = traceback.TracebackException.from_exception(error)
    frames.stack = traceback.StackSummary.from_list(
        [f for f in frames.stack if f.filename != __file__ and "importlib" not in f.filename][-4:]
    )
    return "raised:\n" + "".join(frames.format()).strip()[-4000:]
