"""Measure and decode a video in a process of its own, with limits that the system enforces.

A file can make FFmpeg crash, allocate without end or hang in C, where no check of ours runs. In a
process of its own that costs the file's row: the parent kills it at the deadline, the system
refuses it memory, and whatever its end was becomes a named BadMedia. It imports no torch, so that
it starts in 0.15 s; frames come through a pipe at their own size, one at a time.
"""

import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from verl.data.decoders import DecodedFrame, Decoder
from verl.data.media_files import BadMedia
from verl.data.video import DEFAULT_TIMEOUT_S, VideoInfo
from verl.utils.exits import UserError

FRAME, RESULT = b"F", b"R"
FRAME_HEAD, RESULT_HEAD = struct.Struct("<qd?II"), struct.Struct("<I")
"""Index, seconds, held, height, width, then the bytes; and the length of a JSON object."""
_ROOT = str(Path(__file__).resolve().parents[2])
_PIPE_BYTES = 1 << 20
_SLOWER_END_S = 2.0
"""The process may see its deadline itself before it is killed."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one process may take."""

    timeout_s: float = DEFAULT_TIMEOUT_S
    """Seconds by the clock, from its start to its last frame, those of the caller included."""
    memory_bytes: int = 4 << 30


def probe_in_subprocess(path: str, limits: Limits) -> VideoInfo:
    """`video.probe` in a process of its own. Raises BadMedia, also for its crash."""
    with _Child(path, {"do": "probe"}, limits) as child:
        return VideoInfo(**child.result()["info"])


def frames_from_subprocess(
    info: VideoInfo, indices: Sequence[int], decoder: Decoder, threads: int, limits: Limits
) -> Iterator[DecodedFrame]:
    """`video_decode.iter_frames` in a process of its own. Raises BadMedia, also for its crash."""
    request = {
        "do": "decode",
        "info": asdict(info),
        "indices": list(indices),
        "decoder": decoder,
        "threads": threads,
    }
    with _Child(info.path, request, limits) as child:
        yield from child.frames()


class _Child:
    """One process and what it writes; killed on leaving."""

    def __init__(self, path: str, request: dict[str, Any], limits: Limits) -> None:
        self._path, self._limits = path, limits
        self._end = time.monotonic() + limits.timeout_s + _SLOWER_END_S
        asked = {**request, "path": path, **asdict(limits)}
        self._process = start_child()
        assert self._process.stdin and self._process.stdout
        self._out = self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        fcntl.fcntl(self._out, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        with suppress(BrokenPipeError):  # It ended at once; reading says how.
            # It stays open: its end tells the process that nobody waits any more.
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        with suppress(BrokenPipeError):
            assert self._process.stdin
            self._process.stdin.close()

    def frames(self) -> Iterator[DecodedFrame]:
        while self._read(1) == FRAME:
            index, time_s, held, height, width = FRAME_HEAD.unpack(self._read(FRAME_HEAD.size))
            rgb_HWC = np.frombuffer(self._read(height * width * 3), np.uint8)
            rgb_HWC = rgb_HWC.reshape(height, width, 3)
            yield DecodedFrame(index=index, time_s=time_s, rgb_HWC=rgb_HWC, held=held)
        self._read_result()

    def result(self) -> dict[str, Any]:
        self._read(1)
        return self._read_result()

    def _read_result(self) -> dict[str, Any]:
        (length,) = RESULT_HEAD.unpack(self._read(RESULT_HEAD.size))
        result = json.loads(bytes(self._read(length)))
        if "bad_media" in result:
            raise BadMedia(*result["bad_media"])
        if "user_error" in result:
            raise UserError(result["user_error"])
        return result

    def _read(self, n_bytes: int) -> bytearray:
        """Exactly so many bytes; BadMedia when they do not come, or not in time."""
        data = bytearray(n_bytes)
        rest = memoryview(data)
        while len(rest):
            left_s = self._end - time.monotonic()
            if left_s <= 0 or not self._poll.poll(left_s * 1000):
                raise BadMedia(
                    "timeout", self._path, f"not done after {self._limits.timeout_s:g} s"
                )
            n_read = os.readv(self._out.fileno(), [rest])
            if n_read == 0:
                raise self._ended()
            rest = rest[n_read:]
        return data

    def _ended(self) -> BadMedia:
        """What the end of the process means; it has closed its output."""
        try:
            code = self._process.wait(max(0.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            return BadMedia("timeout", self._path, "the decoder closed its output and did not end")
        if code == -signal.SIGXCPU:
            detail = f"more processor time than {self._limits.timeout_s:g} s allow"
            return BadMedia("timeout", self._path, detail)
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name
        return BadMedia("crashed", self._path, f"the decoder's process ended with {how}")


def start_child(module: str = "verl.data.decode_child") -> "subprocess.Popen[bytes]":
    """A fresh interpreter (not a fork: the parent has threads) that waits for a request."""
    search = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1"},
        bufsize=0,
    )
