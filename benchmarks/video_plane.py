#!/usr/bin/env python3
"""Measures what a video costs before a language model sees it.

    python3 benchmarks/video_plane.py decode FILM        seconds and memory of decoding
    python3 benchmarks/video_plane.py encode --model 3b  the vision tower: share of the peak
    python3 benchmarks/video_plane.py gather             memory of a gather, by its parts
    python3 benchmarks/video_plane.py store              embeddings to a disk and back
    python3 benchmarks/video_plane.py epochs FILM ...    media time of a second epoch

`video_plane.py PART --help` lists the settings of a part. Each prints a table, and with --out
writes JSON with hardware and versions. Nothing needs a network.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

PARTS = ("decode", "encode", "gather", "store", "epochs")


def main(argv: Sequence[str]) -> None:
    """Runs one part; only its own imports are made."""
    if not argv or argv[0] not in PARTS:
        asked = argv[0] if argv else ""
        print(__doc__)
        sys.exit(0 if asked in ("-h", "--help") else f"{asked!r} is no part; use one of {PARTS}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    importlib.import_module(f"plane.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
