"""A process that encodes nothing: it answers, fails or dies as the name of the file says."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from verl.workers.offline_encode import Failed, Fatal, Made, Ready


def toy_serve(job: Any, index: int, device: str, torch_threads: int, pipe: Connection) -> None:
    """Works as `serve`, a file at a time; every file is noted in the folder `job.store_dir`."""
    if device == "broken":
        pipe.send(Fatal("no such device"))
        return
    held_back = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    pipe.send(Ready())
    while (task := pipe.recv()) is not None:
        number, item = task
        name = Path(item.ref.path).name
        once = Path(job.store_dir) / f"{name}.once"
        if "kill" in name and not ("once" in name and once.exists()):
            once.touch()
            time.sleep(0.3)  # so that others wait behind it
            os.kill(os.getpid(), signal.SIGKILL)
        with (Path(job.store_dir) / name).open("a") as notes:
            notes.write(f"{index}\n")
        if "signal" in name:
            pipe.send(Failed(number, "signal", f"held back: {held_back}"))
        elif "bad" in name:
            pipe.send(Failed(number, "truncated", "too short"))
        else:
            pipe.send(Made(number))
