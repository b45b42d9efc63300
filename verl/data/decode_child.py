"""The process that `decode_process` starts: one request on stdin, frames or a result on stdout."""

import json
import logging
import os
import resource
import signal
import sys
import threading
from dataclasses import asdict
from typing import Any, BinaryIO

from verl.data.decode_process import FRAME, FRAME_HEAD, RESULT, RESULT_HEAD
from verl.data.media_files import BadMedia
from verl.data.video import VideoInfo, probe
from verl.data.video_decode import iter_frames
from verl.utils.exits import UserError

_EXTRA_CPU_S = 10


def main() -> None:
    """Answers one request. A crash of the decoder is a crash of this process."""
    logging.basicConfig(level=logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides when this one ends.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What a library prints must not get between the frames.
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_limits(request)
    try:
        result = _answer(request, out)
    except BadMedia as error:
        result = {"bad_media": [error.reason, error.path, error.detail]}
    except UserError as error:
        result = {"user_error": str(error)}
    except MemoryError as error:
        limit = f"more than {request['memory_bytes'] / 2**30:.2g} GiB are needed ({error})"
        result = {"bad_media": ["out_of_memory", request["path"], limit]}
    content = json.dumps(result).encode()
    out.write(RESULT + RESULT_HEAD.pack(len(content)) + content)
    out.flush()


def set_limits(request: dict[str, Any]) -> None:
    """Limits of the kernel for this process: memory it may write to, processor time, no core."""
    memory = request["memory_bytes"]
    # Not RLIMIT_AS, which also counts what is only reserved: 64 MiB and a stack for each thread.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    cpu_s = int(request["timeout_s"] * request.get("threads", 1)) + _EXTRA_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + _EXTRA_CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(request: dict[str, Any], out: BinaryIO) -> dict[str, Any]:
    if request["do"] == "probe":
        return {"info": asdict(probe(request["path"], timeout_s=request["timeout_s"]))}
    info = VideoInfo(**request["info"])
    for frame in iter_frames(
        info,
        request["indices"],
        decoder=request["decoder"],
        timeout_s=request["timeout_s"],
        threads=request["threads"],
    ):
        height, width, _ = frame.rgb_HWC.shape
        out.write(FRAME + FRAME_HEAD.pack(frame.index, frame.time_s, frame.held, height, width))
        out.write(frame.rgb_HWC.data)
    return {}


def _end_with_parent() -> None:
    """Ends the process when the parent closes the pipe or dies."""
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
