"""What all parts of the benchmark share: hardware, versions, the table and the JSON file.

No torch is imported here: the decode part measures the memory of a process without it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "av", "decord", "torchcodec")


def hardware() -> dict[str, Any]:
    """What it runs on; GPUs are added by parts that use them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return {
        "cpu": ", ".join(sorted(models)) or platform.processor(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
    }


def versions() -> dict[str, Any]:
    """Of what is measured; None for what is not installed."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def save(path: str | Path | None, found: dict[str, Any]) -> None:
    """Written after every row, so that a run that is cut off keeps what it measured."""
    if path is None:
        return
    found["hardware"]["load_after"] = os.getloadavg()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(found, indent=2) + "\n")


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table of rows; columns are the keys of all of them, in the order they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_text(row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def peak_gb() -> float:
    """Most host memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
