"""A child process that runs a reward function. Imports no torch, so that it starts in a moment."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
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
    """Why a score could not be used, and for which row."""

    row: int | None
    reason: str


def serve(connection: Connection, call: RewardCall) -> None:
    """Scores lists of rows until the pipe closes; dies with its parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        function = load_function(call.path, call.name)
    except Exception:
        connection.send(RewardFault(None, traceback.format_exc(limit=-3)))
        return
    connection.send(None)
    while True:
        try:
            rows = connection.recv()
        except EOFError:
            return
        connection.send(score_rows(function, rows, call))


def load_function(path: str, name: str) -> Callable[..., Any]:
    """The function `name` of a Python file, which is executed."""
    module = _module(Path(path))
    if not callable(getattr(module, name, None)):
        names = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise AttributeError(f"{path} has no function {name!r}; it has {names}")
    return getattr(module, name)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def score_rows(
    function: Callable[..., Any], rows: Sequence[dict[str, Any]], call: RewardCall
) -> list[dict[str, float]] | RewardFault:
    """Checked scores of all rows, or the first fault."""
    if call.kind == "batch":
        try:
            scores = function(list(rows), **call.kwargs)
        except Exception:
            return RewardFault(None, traceback.format_exc(limit=-3))
        if not isinstance(scores, Sequence) or len(scores) != len(rows):
            size = len(scores) if isinstance(scores, Sequence) else type(scores).__name__
            return RewardFault(None, f"returned {size} for {len(rows)} samples, not a list of them")
    else:
        scores = []
        for i, row in enumerate(rows):
            try:
                scores.append(function(row, **call.kwargs))
            except Exception:
                return RewardFault(i, traceback.format_exc(limit=-3))
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
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"returned {name}={value!r}, which is a {type(value).__name__} and not a number"
        if not math.isfinite(value):
            return f"returned {name}={value!r}, which is not finite"
    return ""
