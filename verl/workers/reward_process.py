"""A child process that runs a reward function. Imports no torch, so that it starts in a moment."""

from __future__ import annotations

import ctypes
import importlib.util
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
    """Why a score could not be used, and for which row of the share; None when that is unknown."""

    row: int | None
    reason: str


def main(descriptor: int, parent: int) -> None:
    """Takes a RewardCall, answers None or a RewardFault, then scores lists of rows until the end.

    The end is that the pipe is closed or the parent is gone, however busy this process is.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it ended before the line above
    connection = Connection(descriptor)
    try:
        serve(connection, connection.recv())
    except (EOFError, ConnectionError):
        return


def serve(connection: Connection, call: RewardCall) -> None:
    """Loads the function and scores until the pipe closes (EOFError)."""
    try:
        function = load_function(call.path, call.name)
    except Exception:
        connection.send(RewardFault(None, f"cannot be loaded:\n{traceback.format_exc(limit=-3)}"))
        return
    connection.send(None)
    while True:
        rows = connection.recv()
        # The parent names the row in progress when this process hangs or dies.
        connection.send(score_rows(function, rows, call, starting=connection.send))


def load_function(path: str, name: str) -> Callable[..., Any]:
    """The function `name` of a Python file, which is executed."""
    module = _module(Path(path))
    if not callable(getattr(module, name, None)):
        names = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise AttributeError(f"{path} has no function {name!r}; it has {names}")
    return getattr(module, name)


def _module(path: Path) -> ModuleType:
    # Not by its own name: a file may be called math.py.
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def score_rows(
    function: Callable[..., Any],
    rows: Sequence[dict[str, Any]],
    call: RewardCall,
    starting: Callable[[int], None] = lambda row: None,
) -> list[dict[str, float]] | RewardFault:
    """Checked scores of all rows, or the first fault.

    `starting` is told of each row before it is scored, where rows are scored one by one.
    """
    if call.kind == "batch":
        try:
            scores = function(list(rows), **call.kwargs)
        except Exception:
            return RewardFault(None, f"raised:\n{traceback.format_exc(limit=-3)}")
        if not isinstance(scores, Sequence) or isinstance(scores, str | bytes):
            return RewardFault(None, f"returned a {type(scores).__name__}, not a list of scores")
        if len(scores) != len(rows):
            return RewardFault(None, f"returned {len(scores)} scores for {len(rows)} samples")
    else:
        scores = []
        for i, row in enumerate(rows):
            starting(i)
            try:
                scores.append(function(row, **call.kwargs))
            except Exception:
                return RewardFault(i, f"raised:\n{traceback.format_exc(limit=-3)}")
    checked = []
    for i, score in enumerate(scores):
        parts = score if isinstance(score, Mapping) else {"overall": score}
        if fault := _fault(parts):
            return RewardFault(i, fault)
        checked.append({str(k): float(v) for k, v in parts.items()})
    return checked


def _fault(parts: Mapping[str, Any]) -> str:
    if "overall" not in parts:
        return f"returned {dict(parts)!r}, which has no 'overall'"
    for name, value in parts.items():
        if not isinstance(value, Real):
            return f"returned {name}={value!r}, a {type(value).__name__} and not a number"
        if not math.isfinite(value):
            return f"returned {name}={value!r}, which is not finite"
    return ""
