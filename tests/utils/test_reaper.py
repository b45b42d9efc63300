"""The reaper: kills what carries the mark of a run once its driver is gone, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.utils.test_processes import eventually
from verl.utils import reaper

DRIVER = '''
import os, subprocess, sys
reaper, run_id, folder, ending = sys.argv[1:]
marked = {**os.environ, "VERL_RUN_ID": run_id}
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
with_child = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
print(subprocess.Popen(sleep, env={}, stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(60)
"""
def sleeper(**env):
    return subprocess.Popen(sleep, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
bystander = sleeper()
inner = sleeper(VERL_RUN_ID=run_id + ".inner")
other = sleeper(VERL_RUN_ID=run_id + "0")
parent = subprocess.Popen(
    [sys.executable, "-c", with_child], env=marked, stdout=subprocess.PIPE, text=True
)
unmarked_child = int(parent.stdout.readline())
watcher = subprocess.Popen(
    [sys.executable, "-I", "-S", reaper, run_id, folder, str(os.getpid())],
    stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    env={"VERL_REAPER": "1"},
)
print(watcher.pid, parent.pid, unmarked_child, inner.pid, bystander.pid, other.pid, flush=True)
if ending == "farewell":
    watcher.stdin.write(b"done")
    sys.exit()
os.kill(os.getpid(), 9)
'''


@pytest.fixture(params=["farewell", "SIGKILL"])
def ended_run(request, tmp_path: Path) -> Iterator[tuple[list[int], Path, str, str]]:
    """Processes of a driver that has just ended, its folder, its error output and the ending."""
    folder = tmp_path / "session"
    folder.mkdir()
    (folder / "log").write_text("x")
    script = textwrap.dedent(DRIVER)
    command = [sys.executable, "-c", script, reaper.__file__, f"id{os.getpid()}", str(folder)]
    with (tmp_path / "stderr").open("w+") as error:
        run = subprocess.run(
            [*command, request.param], stdout=subprocess.PIPE, stderr=error, text=True, check=False
        )
        pids = [int(word) for word in run.stdout.split()]
        assert eventually(lambda: is_gone(pids[0]))
        error.seek(0)
        yield pids, folder, error.read(), request.param
    for pid in pids:
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_marked_processes_and_their_descendants_end_and_others_live_on(ended_run):
    (_, parent, unmarked_child, inner, bystander, other), folder, error, ending = ended_run
    assert all(is_gone(pid) for pid in (parent, unmarked_child, inner))
    assert not is_gone(bystander) and not is_gone(other)
    assert not folder.exists()
    assert ("was killed or crashed" in error) == (ending == "SIGKILL")
