"""Media time of a first epoch against a second: decode, encode, store; then mapped reads.

    python3 benchmarks/video_plane.py epochs FILM [FILM ...] [--segments 4] [--frames 256]

Each film is cut into --segments videos of equal length. An epoch asks for the features of one video
after the other and copies them to the device, as training does. `first`: nothing is stored;
`second`: the same process again; `later run`: a new store object, which compares all checksums.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from plane import tower
from plane.common import hardware, peak_gb, save, show, versions
from verl.data.embed_store import EmbedStore
from verl.data.media import FrameSampling, MediaCache, MediaItem, Reading, make_media_item
from verl.data.preprocess import VisionSpec
from verl.data.video import probe
from verl.models.adapter import Adapter
from verl.workers.encoder import MediaEncoder, StoredFeatures, WholeModel

LIMIT_BYTES = 1 << 40


def main(argv: Sequence[str]) -> None:
    """Command line entry."""
    args = _arguments(argv)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    hf, adapter = tower.build(args.model, device, dtype)
    if args.variant != "ours":
        hf = tower.variant(hf, args.variant)
    items = [item for film in args.films for item in _videos(film, args)]
    found: dict[str, Any] = {
        "part": "epochs",
        "hardware": hardware() | {"gpu": torch.cuda.get_device_name(device) if on_gpu else None},
        "versions": versions(),
        "settings": {k: str(v) for k, v in vars(args).items() if k != "out"},
        "grids_thw": [item.grid_thw for item in items],
        "measured": [],
    }
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        encoder = _encoder(hf, adapter, device, dtype, Path(folder))
        later = _encoder(hf, adapter, device, dtype, Path(folder))
        first_s = 0.0
        for epoch, used in (("first", encoder), ("second", encoder), ("later run", later)):
            before = used.encoded.total()
            seconds, n_bytes = _epoch(used, items, device)
            first_s = first_s or seconds
            row = {"epoch": epoch, "videos": len(items), "frames": sum(map(_frames, items))}
            row |= {"encoded": used.encoded.total() - before, "seconds": seconds}
            row |= {"share_of_first": seconds / first_s, "features_gb": n_bytes / 1e9}
            found["measured"].append(row | {"peak_gb": peak_gb()})
            save(args.out, found)
    show(found["measured"])


def _encoder(
    hf: Any, adapter: Adapter, device: torch.device, dtype: torch.dtype, folder: Path
) -> MediaEncoder:
    """As a worker makes it, with frames and features under one folder."""
    assert adapter.vision is not None
    stored = StoredFeatures(
        store=EmbedStore(folder / "features", LIMIT_BYTES), family="qwen2_5_vl",
        weights="random", dtype=dtype, pixels=adapter.vision,
    )  # fmt: skip
    engine = WholeModel(hf, adapter, device)
    return MediaEncoder(engine, MediaCache(folder / "frames", LIMIT_BYTES), stored=stored)


def _epoch(
    encoder: MediaEncoder, items: Sequence[MediaItem], device: torch.device
) -> tuple[float, int]:
    """Seconds, and bytes of features that arrived on the device."""
    n_bytes = 0
    started = time.perf_counter()
    for item in items:
        features_ME = encoder.features([item])
        assert features_ME is not None
        n_bytes += features_ME.to(device, copy=True).nbytes
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, n_bytes


def _videos(film: str, args: argparse.Namespace) -> list[MediaItem]:
    """Equal parts of a film, measured."""
    rule = VisionSpec().resize_rule("video", 28 * 28, args.max_pixels)
    info = probe(film)
    part_s = info.n_frames / info.fps / args.segments
    parts = [(i * part_s, (i + 1) * part_s) for i in range(args.segments)]
    samplings = [
        FrameSampling(num_frames=args.frames, start_s=start, end_s=end) for start, end in parts
    ]
    reading = Reading(threads=args.threads)
    return [make_media_item(film, "video", s, rule, reading=reading) for s in samplings]


def _frames(item: MediaItem) -> int:
    return len(item.frame_times)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "video_plane.py epochs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    parser.add_argument("films", nargs="+")
    parser.add_argument("--segments", type=int, default=4, help="videos made of each film")
    parser.add_argument("--frames", type=int, default=256, help="of each video")
    parser.add_argument("--max-pixels", type=int, default=128 * 28 * 28, help="of a frame")
    parser.add_argument("--threads", type=int, default=1, help="of the decoder")
    parser.add_argument("--model", choices=tower.SHAPES, default="3b" if on_gpu else "tiny")
    parser.add_argument("--variant", default="ours", help="see plane/tower.py")
    parser.add_argument("--dir", type=Path, help="existing folder for frames and features")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file, best under benchmarks/results")
    return parser.parse_args(argv)
