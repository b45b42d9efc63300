"""Ends what is left of a run when its driver is gone, however it went.

A script of its own that needs only the standard library. The driver starts it in a new session and
holds the other end of its standard input: when that closes, also because the driver got SIGKILL,
every process that carries the run's mark in its environment is killed, and the run's temporary
folder is removed. Processes of other runs and of other Ray clusters carry no such mark.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

RUN_ID = "VERL_RUN_ID"
"""Environment variable that marks the processes of a run. Ray's daemons and workers inherit it.
A run inside of another one appends to its mark: `outer.inner`."""
REAPER = "VERL_REAPER"
"""Environment variable that marks a reaper, which must outlive the run that it watches."""
FAREWELL = b"done"
"""What a driver writes to its reaper when it ends by its own will."""
KILL_S = 20.0
"""How long to go on when processes do not disappear (they may hang in a driver of the kernel)."""


def wait_for_end_of(parent: int) -> bool:
    """Returns when the driver has ended: whether it had said `FAREWELL` before.

    It has ended when standard input is closed or this process has lost its parent. A child that
    the driver forked may still hold the pipe, hence the second condition.
    """
    said = b""
    orphaned = False
    while not orphaned:
        orphaned = os.getppid() != parent
        # An orphan still reads what its parent may have said just before.
        while select.select([0], [], [], 0 if orphaned else 1.0)[0]:
            data = os.read(0, 4096)
            if not data:
                return said == FAREWELL
            said += data
    return said == FAREWELL


def marked_processes(run_id: str) -> set[int]:
    """Living processes of a run: those that carry its mark, and their descendants."""
    mark = f"{RUN_ID}={run_id}".encode()
    inner_mark = mark + b"."
    marked: set[int] = set()
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
        pid, state, parent = int(entry.name), status[0], int(status[1])
        if state == "Z" or any(v.startswith(REAPER.encode()) for v in environment):
            continue
        children.setdefault(parent, []).append(pid)
        if any(v == mark or v.startswith(inner_mark) for v in environment):
            marked.add(pid)
    queue = list(marked)
    while queue:
        for child in children.get(queue.pop(), []):
            if child not in marked:
                marked.add(child)
                queue.append(child)
    return marked


def kill_run(run_id: str) -> None:
    """Kills the processes of a run until none is found twice in a row."""
    deadline = time.monotonic() + KILL_S
    empty_scans = 0
    while empty_scans < 2 and time.monotonic() < deadline:
        victims = marked_processes(run_id)
        empty_scans = 0 if victims else empty_scans + 1
        for pid in victims:
            _kill(pid)
        time.sleep(0.1)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:  # ended between the scan and now
        return


def main(run_id: str, folder: str, parent: int) -> None:
    """Waits for the end of the driver, then leaves nothing behind."""
    expected = wait_for_end_of(parent)
    kill_run(run_id)
    shutil.rmtree(folder, ignore_errors=True)
    if not expected:
        message = (
            f"\nerror: The driver (process {parent}) was killed or crashed; its workers have been "
            "ended.\nThe same command goes on from the newest checkpoint, if there is one and "
            "trainer.find_last_checkpoint is true; else it starts anew.\n"
        )
        with contextlib.suppress(OSError):  # the terminal may be gone as well
            os.write(2, message.encode())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
