"""Seconds and peak memory of decoding a film, and its frames against sequential PyAV.

    python3 benchmarks/video_plane.py decode FILM [--hour FILE] [--frames 64 256 1024 3600]
           [--compare] [--out benchmarks/results/video_decode.json]

FILM is what examples/real_film.sh fetches (outputs/real_film/bbb.mp4). --hour adds an hour-long
file, made of copies of FILM without encoding when it is not there. Each measurement is a process
of its own. --compare decodes all of FILM with every decoder and compares frame by frame.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av

from plane.common import hardware, peak_gb, save, show, versions
from verl.data import video_decode
from verl.data.decoders import BACKENDS
from verl.data.media import FrameSampling, Reading, decode_media, make_media_item
from verl.data.preprocess import VisionSpec
from verl.data.video import probe
from verl.data.video_decode import iter_frames

MAX_PIXELS = 128 * 28 * 28
"""Of a frame, as in the published recipe for long videos: about 128 tokens for two frames."""
HOUR_S = 3620
STRIDES = (1, 56)
# Written down before anything was measured with this script: seconds, and peak GB.
PREDICTED = {
    "film": {"64": [3.4, 0.5], "256": [9.6, 0.55], "1024": [15, 0.8], "3600": [35, 1.6]},
    "hour": {"64": [3.8, 0.5], "256": [13, 0.6], "1024": [45, 0.8], "3600": [80, 1.6]},
}


def main(argv: Sequence[str]) -> None:
    """Command line entry."""
    arguments = _arguments(argv)
    if arguments.one:
        print(json.dumps(measure(arguments.film, json.loads(arguments.one))))
        return
    files = {"film": arguments.film}
    if arguments.hour:
        files["hour"] = arguments.hour
        if not Path(arguments.hour).exists():
            repeat(arguments.film, arguments.hour, HOUR_S)
    found: dict[str, Any] = {
        "hardware": hardware(),
        "versions": versions() | {"ffmpeg_of_av": _ffmpeg()},
        "max_pixels_of_a_frame": MAX_PIXELS,
        "predicted_seconds_and_peak_gb": PREDICTED,
        "measured": [],
    }
    for name, path in files.items():
        for n_frames in arguments.frames:
            for settings in arguments.settings:
                row = {"file": name, "frames": n_frames, **json.loads(settings)}
                row |= _in_own_process(path, row)
                print(json.dumps(row), flush=True)
                found["measured"].append(row)
                save(arguments.out, found)
    show(found["measured"])
    if arguments.compare:
        for decoder, equal in compare(arguments.film):
            found.setdefault("equal_to_sequential_pyav", {})[decoder] = equal
            save(arguments.out, found)
    save(arguments.out, found)


def measure(path: str, row: dict[str, Any]) -> dict[str, Any]:
    """Decodes in this process; memory as the system counted it."""
    if row.get("jumps") == "never":
        video_decode._WORTH_A_JUMP = 1 << 60
    elif row.get("jumps") == "always":
        video_decode._WORTH_A_JUMP = 1
    reading = Reading(threads=row.get("threads", 1), in_subprocess=row.get("apart", False))
    rule = VisionSpec().resize_rule("video", 28 * 28, MAX_PIXELS)
    sampling = FrameSampling(num_frames=row["frames"])
    before_gb, load = peak_gb(), os.getloadavg()[0]
    start, cpu_start = time.perf_counter(), time.process_time()
    item = make_media_item(path, "video", sampling, rule, row.get("decoder", "pyav"), reading)
    probed = time.perf_counter()
    frames = decode_media(item.ref).frames_u8
    seconds = time.perf_counter() - probed
    return {
        "probe_s": round(probed - start, 3),
        "decode_s": round(seconds, 2),
        "cpu_s": round(time.process_time() - cpu_start, 2),
        "peak_gb": round(peak_gb(), 3),
        "gb_before": round(before_gb, 3),
        "frames_gb": round(frames.numel() / 1e9, 3),
        "size": list(frames.shape[-2:]),
        "load_before": round(load, 2),
    }


def compare(path: str) -> Iterator[tuple[str, Any]]:
    """For each decoder: of each stride, how many frames equal those of sequential PyAV.

    Every fourth pixel each way is looked at.
    """
    info = probe(path)
    far, video_decode._WORTH_A_JUMP = video_decode._WORTH_A_JUMP, 1 << 60
    skipped, video_decode._TELL_UNREFERENCED = video_decode._TELL_UNREFERENCED, ()
    expected = [_digest(frame.rgb_HWC) for frame in iter_frames(info, range(info.n_frames))]
    video_decode._WORTH_A_JUMP, video_decode._TELL_UNREFERENCED = far, skipped
    for decoder in BACKENDS:
        found: Any = {}
        for stride in STRIDES:
            indices = range(stride // 2, info.n_frames, stride)
            try:
                frames = iter_frames(info, indices, decoder=decoder)  # type: ignore[arg-type]
                equal = sum(_digest(f.rgb_HWC) == expected[f.index] for f in frames)
            except Exception as error:
                found = f"left out: {error}"
                break
            found[f"every {stride}"] = f"{equal} of {len(indices)}"
        print(decoder, found, flush=True)
        yield decoder, found


def repeat(source: str, target: str, seconds: float) -> None:
    """Copies of the pictures of `source` one after the other, not encoded again."""
    temporary = f"{target}.part.mp4"
    with av.open(temporary, "w") as out:
        stream, shift, time_s = None, 0, 0.0
        while time_s < seconds:
            with av.open(source) as film:
                own = film.streams.video[0]
                stream = stream or out.add_stream_from_template(own)
                end = 0
                for packet in film.demux(own):
                    if packet.dts is None or packet.pts is None or own.time_base is None:
                        continue
                    end = max(end, packet.pts + (packet.duration or 0))
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    time_s = float(packet.pts * own.time_base)
                    if time_s > seconds:
                        break
                    packet.stream = stream
                    out.mux(packet)
                shift += end
    os.replace(temporary, target)


def _in_own_process(path: str, row: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).parents[1] / "video_plane.py"
    command = [sys.executable, str(script), "decode", path, "--one", json.dumps(row)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _digest(rgb_HWC: Any) -> bytes:
    return hashlib.blake2b(rgb_HWC[::4, ::4].tobytes(), digest_size=8).digest()


def _ffmpeg() -> dict[str, str]:
    return {k: ".".join(map(str, v)) for k, v in av.library_versions.items()}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "video_plane.py decode", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("film")
    parser.add_argument("--hour")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 256, 1024, 3600])
    parser.add_argument("--settings", nargs="+", default=["{}"], help="JSON: threads, jumps, ...")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--out", default="benchmarks/results/video_decode.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)
