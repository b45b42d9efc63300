"""The decoding process with a decoder that is broken as the environment says; run with -m.

Files called good are decoded as they should be.
"""

import ctypes
import os
import time

from verl.data import decode_child, video_decode
from verl.data.decoders import BACKENDS, Backend


def decode(info, indices, deadline, threads):
    for n, frame in enumerate(video_decode._decode_with_pyav(info, indices, deadline, threads)):
        if n == 2 and "good" not in os.path.basename(info.path):
            BREAKS[os.environ["VERL_TEST_BREAK"]]()
        yield frame


def _eat_memory() -> None:
    eaten = []
    while True:
        eaten.append(bytearray(b"x" * 10_000_000))


BREAKS = {
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(7),
    # In C, and with the interpreter locked: no check of Python runs any more.
    "hang": lambda: ctypes.PyDLL(None).sleep(1000),
    "sleep": lambda: time.sleep(1000),
    "memory": _eat_memory,
}

if __name__ == "__main__":
    BACKENDS["pyav"] = Backend(decode=decode, refuses=lambda _: False)
    decode_child.main()
