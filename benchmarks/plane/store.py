"""GB a second of writing an embedding to the store and of reading it back.

    python3 benchmarks/video_plane.py store [--gb 1.0] [--dir FOLDER]

Writing ends when the file is on the disk (fsync). Every reading is by a store object of its own,
as of a new process, so that all checksums are compared; it ends when every byte was touched.
`warm`: the file is in the page cache, from writing it. `cold`: the system was asked to drop it
(posix_fadvise), which a folder in memory cannot do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from plane.common import hardware, save, show, versions
from verl.data.embed_store import EmbedKey, Embeds, EmbedStore

WIDTH = 2048
KEY = EmbedKey(media="benchmark", family="qwen2_5_vl", weights="none", dtype=torch.bfloat16)


def main(argv: Sequence[str]) -> None:
    """Command line entry."""
    args = _arguments(argv)
    rows = int(args.gb * 1e9 / 2 / WIDTH)
    made = Embeds(
        torch.randint(0, 1 << 15, (rows, WIDTH), dtype=torch.int16).view(torch.bfloat16),
        grid_thw=(rows, 2, 2), seconds_per_grid=1.0, frame_times=(0.0,) * rows, path="/noise",
    )  # fmt: skip
    found: dict[str, Any] = {
        "part": "store",
        "hardware": hardware() | {"file_system": _file_system(args.dir)},
        "versions": versions(),
        "settings": {"gb": args.gb, "repeats": args.repeats},
        "measured": [],
    }
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        # Without what pages the first writing allocates, later ones say what a run sees.
        timed = {
            "write": lambda: _written(folder, made),
            "read warm": lambda: _read(folder, None),
            "read cold": lambda: _read_cold(folder),
            "read a tenth, warm": lambda: _read(folder, (rows // 2, rows // 2 + rows // 10)),
        }
        for what, once in timed.items():
            amount = args.gb / 10 if "tenth" in what else args.gb
            seconds = statistics.median(once() for _ in range(args.repeats))
            row = {"what": what, "gb": amount, "seconds": seconds, "gb_a_s": amount / seconds}
            found["measured"].append(row)
            save(args.out, found)
    show(found["measured"])


def _written(folder: str, made: Embeds) -> float:
    store = EmbedStore(folder, 1 << 40)
    store.path_of(KEY).unlink(missing_ok=True)
    started = time.perf_counter()
    if not store.put(KEY, made):
        raise SystemExit(f"--dir {folder}: no room for {made.features.nbytes / 1e9:.1f} GB")
    return time.perf_counter() - started


def _read(folder: str, rows: tuple[int, int] | None) -> float:
    store = EmbedStore(folder, 1 << 40)
    started = time.perf_counter()
    embeds = store.get(KEY, rows)
    assert embeds is not None
    features = embeds.features if rows is None else embeds.slice(*rows)
    features.clone()
    return time.perf_counter() - started


def _read_cold(folder: str) -> float:
    with open(EmbedStore(folder, 1 << 40).path_of(KEY), "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _read(folder, None)


def _file_system(folder: Path | None) -> str:
    """Kind of file system of a folder, by the longest mount point that holds it."""
    path = str((folder or Path(tempfile.gettempdir())).resolve()) + "/"
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max((point, kind) for point, kind in mounts if path.startswith(point.rstrip("/") + "/"))[
        1
    ]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "video_plane.py store", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--gb", type=float, default=1.0, help="bytes of the embedding, 10^9")
    parser.add_argument("--dir", type=Path, help="existing folder on the disk to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file, best under benchmarks/results")
    return parser.parse_args(argv)
