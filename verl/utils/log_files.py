"""The files of a run that other tools read: one JSON object a line, steps in order, no gaps."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """Appends objects that have a `step`. Strict JSON: numbers that are not finite become null.

    A resumed run repeats steps that its killed predecessor had logged after the last checkpoint.
    `begin` removes those lines first, so that every step stands in the file once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, last_step: int | None) -> float | None:
        """Keeps lines up to `last_step`; None starts a new file, the old one is put aside.

        Returns the step of the last line that is kept; None where none is.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return None
        text = self.path.read_text(encoding="utf-8", errors="replace")
        *lines, cut_off = text.split("\n")  # a kill while writing leaves a line without an end
        kept = [line for line in lines if _step(line) <= (-1 if last_step is None else last_step)]
        if not kept and text:
            aside = _free_name(self.path)
            self.path.rename(aside)
            logger.info("%s of an earlier run is now %s", self.path, aside.name)
        elif cut_off or len(kept) < len(lines):
            temporary = self.path.with_name(f"{self.path.name}.tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            temporary.replace(self.path)
            dropped = len(lines) - len(kept)
            logger.info("%s: dropped %d lines after step %s", self.path, dropped, last_step)
        return _step(kept[-1]) if kept else None

    def write(self, content: Mapping[str, Any]) -> None:
        """Appends one line; it is in the file, whole, when this returns."""
        line = json.dumps(strict(content), ensure_ascii=False, allow_nan=False, default=str)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def strict(value: Any) -> Any:
    """A copy that strict JSON can hold: NaN and infinities become None."""
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _step(line: str) -> float:
    """The line's step; infinity for a line that was cut off by a kill, which drops it."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate
