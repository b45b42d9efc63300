"""Time and peak memory of gathering one piece of media, by `worker.rollout.num_chunk_seq`.

    torchrun --nproc_per_node=2 benchmarks/video_plane.py gather --gb 1.0

Features are ready on every rank (random bytes instead of a tower), so that the gather of
`verl.workers.parallel_encode` alone is measured, on the CPU over gloo. Most parts come first: the
peak of a process never falls, so what each setting adds to it stands there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plane.common import hardware, peak_gb, save, show, versions
from plane.encode import join
from verl.data.media import MediaItem, MediaRef
from verl.data.preprocess import VisionSpec
from verl.workers.encode_plan import Slice
from verl.workers.parallel_encode import ParallelEncoder

WIDTH = 2048
SIDE = 20
"""Patches along each side of a frame: 100 tokens a temporal step."""


def main(argv: Sequence[str]) -> None:
    """Command line entry; the first rank writes what it gathered, and prints."""
    args = _arguments(argv)
    device, rank = join("cpu")
    steps = max(2, int(args.gb * 1e9 / 2 / WIDTH / (SIDE * SIDE // 4)))
    item = _item((steps, SIDE, SIDE))
    found: dict[str, Any] = {
        "part": "gather",
        "hardware": hardware(),
        "versions": versions(),
        "settings": {"gb": args.gb, "ranks": dist.get_world_size(), "width": WIDTH},
        "measured": [],
    }
    peak = before = peak_gb()
    for chunks in sorted(args.chunks, reverse=True):
        seconds = _gathered(item, chunks, device)
        peak = peak_gb()
        row = {
            "num_chunk_seq": chunks,
            "seconds": seconds,
            "peak_gb": peak,
            "added_gb": peak - before,
        }
        found["measured"].append(row)
        if rank == 0:
            save(args.out, found)
    if rank == 0:
        show(found["measured"])
    dist.destroy_process_group()


def _gathered(item: MediaItem, chunks: int, device: torch.device) -> float:
    def ready(items: Sequence[MediaItem], slices: Sequence[Slice]) -> Tensor:
        n = sum(s.stop - s.start for s in slices) * SIDE * SIDE // 4
        return torch.ones(n, WIDTH, dtype=torch.bfloat16)

    parallel = ParallelEncoder(
        ready, lambda item, features_ME: True,
        device=device, merge_size=2, block_patches=4096, num_chunk_seq=chunks,
    )  # fmt: skip
    dist.barrier()
    started = time.perf_counter()
    parallel.run([item], lambda _: False)
    dist.barrier()
    return time.perf_counter() - started


def _item(grid: tuple[int, int, int]) -> MediaItem:
    ref = MediaRef("video", "/noise", None, VisionSpec().resize_rule("video"), key="noise")
    return MediaItem(ref, grid, 1.0, grid[0] * grid[1] * grid[2] // 4, ())


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "video_plane.py gather", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--gb", type=float, default=1.0, help="bytes of the features, 10^9")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--out", type=Path, help="JSON file, best under benchmarks/results")
    return parser.parse_args(argv)
