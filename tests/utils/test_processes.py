"""A run ends within seconds with its reason and leaves nothing behind, whatever kills it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from verl.utils import processes, reaper
from verl.utils.processes import ClusterUnreachable, ray_session, usable_cores

ROOT = Path(__file__).parents[2]
SECONDS_TO_END = 30


def eventually(condition: Callable[[], bool], seconds: float = SECONDS_TO_END) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """pytest's own temporary folders are too deep for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


class Driver:
    """A run of `toy_driver.py` that has come to the point where its workers hang."""

    def __init__(self, temp: Path, **variables: str) -> None:
        env = {**os.environ, "TMPDIR": str(temp), "PYTHONPATH": str(ROOT), **variables}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.utils.toy_driver"], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout
        words = self.process.stdout.readline().split()
        assert words, self.process.communicate()[1]
        self.run_id, self.workers = words[0], [int(word) for word in words[1:]]

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int, str]:
        """Exit code and error output."""
        error = self.process.communicate(timeout=SECONDS_TO_END)[1]
        return self.process.returncode, error


def kill_worker(driver: Driver) -> None:
    os.kill(driver.workers[1], signal.SIGKILL)


def kill_driver(driver: Driver) -> None:
    os.kill(driver.process.pid, signal.SIGKILL)


def press_ctrl_c(driver: Driver) -> None:
    # A terminal sends it to the whole foreground group, Ray's daemons included.
    os.killpg(driver.process.pid, signal.SIGINT)


def terminate(driver: Driver) -> None:
    os.kill(driver.process.pid, signal.SIGTERM)


@pytest.mark.parametrize(
    ("blow", "code", "reason"),
    [
        (kill_worker, 1, "error: Worker rank 1 died in wait_for_others(): process"),
        (kill_driver, -signal.SIGKILL, "was killed or crashed; its workers have been ended"),
        (press_ctrl_c, 130, "Stopped by SIGINT."),
        (terminate, 143, "Stopped by SIGTERM."),
    ],
)
def test_a_run_ends_with_its_reason_and_leaves_nothing_behind(
    ray_cluster: None, short_folder: Path, blow: Callable[[Driver], None], code: int, reason: str
):
    driver = Driver(short_folder)
    family = driver.descendants()
    marked = reaper.marked_processes(driver.run_id)
    assert set(driver.workers) <= marked
    # Ray's daemons, its agents and the workers carry the mark themselves; the reaper does not.
    carriers = [p for p in family if p.environ().get(reaper.RUN_ID) == driver.run_id]
    assert len(carriers) == len(family) - 1 >= 7

    blow(driver)
    returncode, error = driver.end()

    assert returncode == code, error
    assert reason in error
    assert "The same command goes on from the newest checkpoint" in error
    assert "Traceback" not in error
    assert eventually(lambda: not reaper.marked_processes(driver.run_id))
    assert eventually(lambda: not any(p.is_running() and p.pid != os.getpid() for p in family))
    assert eventually(lambda: not list(short_folder.iterdir()))
    assert_a_cluster_beside_it_is_unharmed()


def test_a_run_on_an_existing_cluster_ends_its_workers_and_not_the_cluster(
    ray_cluster: None, short_folder: Path
):
    import ray

    address = ray.get_runtime_context().gcs_address
    driver = Driver(short_folder, RAY_ADDRESS=address)
    assert not list(short_folder.iterdir())  # no cluster of its own
    terminate(driver)
    returncode, error = driver.end()
    assert returncode == 143, error
    assert eventually(lambda: not any(psutil.pid_exists(pid) for pid in driver.workers))
    assert_a_cluster_beside_it_is_unharmed()


def assert_a_cluster_beside_it_is_unharmed() -> None:
    import ray

    assert ray.get(ray.remote(lambda: "alive").remote(), timeout=60) == "alive"


def test_a_session_inside_of_another_uses_its_cluster(ray_cluster: None):
    import ray

    before = ray.get_runtime_context().get_node_id()
    with ray_session(num_cpus=1):
        assert ray.get_runtime_context().get_node_id() == before
    assert ray.is_initialized()


def test_an_address_at_which_nothing_answers_is_refused_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nobody else can answer there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterUnreachable, match=f"RAY_ADDRESS={address}: nothing answers"):
            processes._probe(address)


def test_a_long_temporary_folder_is_avoided(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "deep" / "and" / "deeper"))
    folder = processes._short_temp_dir()
    folder.rmdir()
    assert len(str(folder)) < 40


def test_a_small_shared_memory_moves_the_object_store_to_a_folder(monkeypatch, tmp_path, caplog):
    def usage(free: int) -> Callable[[Path], shutil._ntuple_diskusage]:
        return lambda _path: shutil._ntuple_diskusage(free, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", usage(64 * 2**20))
    assert processes._object_store(2**30, tmp_path)["_plasma_directory"] == str(tmp_path)
    assert "--shm-size" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", usage(500 * 2**20))
    assert processes._object_store(2**30, tmp_path) == {"object_store_memory": 400 * 2**20}
    monkeypatch.setattr(shutil, "disk_usage", usage(2**40))
    assert processes._object_store(2**30, tmp_path) == {"object_store_memory": 2**30}


def test_usable_cores_follow_the_affinity():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from verl.utils.processes import usable_cores; print(usable_cores())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "1\n"
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
