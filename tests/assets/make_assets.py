"""Makes tests/assets/bbb_60s.mp4 out of the film: `make_assets.py FILM OUT` (needs av)."""

from __future__ import annotations

import hashlib
import sys
from fractions import Fraction
from pathlib import Path

import av

START_S, SECONDS, FPS = 60, 60, 12
WIDTH, HEIGHT = 160, 90


def cut(film: Path, out: Path) -> int:
    """Every second frame of one minute, small, without sound; returns the number of frames."""
    with av.open(str(film)) as source, av.open(str(out), "w") as target:
        video = source.streams.video[0]
        keep_every = round(video.average_rate / FPS)
        stream = target.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        # Key frames every 4 s, so that tests can seek; one thread gives the same file each time.
        stream.options = {"crf": "26", "preset": "veryslow", "g": str(4 * FPS), "threads": "1"}
        source.seek(int(START_S / video.time_base), stream=video)
        n_read = n_written = 0
        for frame in source.decode(video):
            if frame.time < START_S - 1e-6:
                continue
            if n_read % keep_every == 0:
                small = frame.reformat(WIDTH, HEIGHT, "yuv420p", interpolation="LANCZOS")
                small.pts, small.time_base = n_written, Fraction(1, FPS)
                target.mux(stream.encode(small))
                n_written += 1
            n_read += 1
            if n_written == SECONDS * FPS:
                break
        target.mux(stream.encode())
    return n_written


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(f"usage: {sys.argv[0]} FILM OUT")
    target_path = Path(sys.argv[2])
    frames = cut(Path(sys.argv[1]), target_path)
    digest = hashlib.sha256(target_path.read_bytes()).hexdigest()
    print(f"{target_path}: {frames} frames, {target_path.stat().st_size} bytes, sha256 {digest}")
