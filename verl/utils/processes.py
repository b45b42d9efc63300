"""The processes of a run: its share of cores, its Ray session, and nothing left afterwards."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from verl.utils import reaper
from verl.utils.exits import Explained, Interrupted, exit_on_error, signals_raise

__all__ = ["ClusterUnreachable", "Interrupted", "exit_on_error", "ray_session", "usable_cores"]

logger = logging.getLogger(__name__)

_MIN_OBJECT_STORE = 80 * 2**20  # Ray refuses less than 78,643,200 bytes.


class ClusterUnreachable(Explained, ConnectionError):
    """Nothing answers at the address of an existing Ray cluster."""


def usable_cores() -> int:
    """CPU cores that this process may use, by affinity and by the quota of its container."""
    cores = len(os.sched_getaffinity(0))
    quota_file = Path("/sys/fs/cgroup/cpu.max")
    if quota_file.exists():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


@contextmanager
def ray_session(
    *,
    num_cpus: int | None = None,
    device: str = "cpu",
    num_gpus: int | None = None,
    object_store_gib: float = 1.0,
    address: str | None = None,
) -> Iterator[None]:
    """Ray for the duration of a block; nothing of it is left afterwards, not even after SIGKILL.

    Starts a cluster on this machine, unless `address` or RAY_ADDRESS names one: that one is joined
    and never stopped. Inside of the block, SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the
    main thread; a second one ends the process at once. Where Ray is already initialised, the block
    uses it as it is.

    Args:
        num_cpus: CPUs that Ray may hand out; null means the cores of the machine.
        device: "cpu" hides the GPUs from Ray.
        num_gpus: GPUs that Ray may hand out on "cuda"; null means those it finds.
        object_store_gib: shared memory for batches in flight, less if /dev/shm is smaller.

    Raises:
        ClusterUnreachable: nothing answers at `address`.
    """
    import ray

    with ExitStack() as stack:
        rearm = stack.enter_context(signals_raise())
        if not ray.is_initialized():
            address = address or os.environ.get("RAY_ADDRESS")
            if address and address != "local":
                _probe(address)
                stack.callback(ray.shutdown)
                ray.init(address=address, logging_level=logging.WARNING)
            else:
                folder = stack.enter_context(_reaped_run())
                stack.callback(ray.shutdown)
                gpus = 0 if device == "cpu" else num_gpus
                _start_ray(folder, num_cpus, gpus, int(object_store_gib * 2**30))
            rearm()  # ray.init put its own SIGTERM handler in place of ours.
        yield


@contextmanager
def _reaped_run() -> Iterator[Path]:
    """A folder for Ray's files and a mark on all processes to come; both end with this process."""
    folder = _short_temp_dir()
    outer = os.environ.get(reaper.RUN_ID)
    run_id = (f"{outer}." if outer else "") + secrets.token_hex(8)
    # Some libraries write their process title over the environment, and with it over the mark.
    changes = {reaper.RUN_ID: run_id, "SPT_NOENV": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    before = {key: os.environ.get(key) for key in changes}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, run_id, str(folder), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={reaper.REAPER: "1", "PATH": os.environ.get("PATH", "")},
        start_new_session=True,
        cwd="/",
    )
    os.environ.update(changes)
    try:
        yield folder
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        process.communicate(reaper.FAREWELL)


def _start_ray(folder: Path, num_cpus: int | None, num_gpus: int | None, object_store: int) -> None:
    import ray

    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # A token of our own: Ray would write one to the home directory, which may be read-only.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray recommends at this point to consider less security.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.init(
        num_cpus=num_cpus or usable_cores(),
        num_gpus=num_gpus,
        include_dashboard=False,
        logging_level=logging.WARNING,
        _temp_dir=str(folder),
        # A minute by default, in which everything waits, before a dead cluster ends the run.
        _system_config={"gcs_rpc_server_reconnect_timeout_s": 15},
        **_object_store(object_store, folder),
    )


def _object_store(n_bytes: int, folder: Path) -> dict[str, Any]:
    """Size and place of the object store: shared memory if there is enough, else a folder."""
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.is_dir() else 0
    if free >= 1.25 * _MIN_OBJECT_STORE:
        return {"object_store_memory": max(_MIN_OBJECT_STORE, min(n_bytes, int(0.8 * free)))}
    logger.warning(
        "/dev/shm has %d MiB free; Ray keeps its objects in %s instead, which is slower. "
        "In docker, use --shm-size=2g or more.", free // 2**20, folder,
    )  # fmt: skip
    return {
        "object_store_memory": max(_MIN_OBJECT_STORE, n_bytes),
        "_plasma_directory": str(folder),
    }


def _short_temp_dir() -> Path:
    """A new folder whose path leaves room for Ray's sockets, which are limited to 107 bytes."""
    for root in (tempfile.gettempdir(), "/tmp", "/dev/shm"):
        if len(root) < 26 and os.access(root, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="verl-", dir=root))
    raise OSError(
        f"No writable folder with a short path for Ray's sockets: {tempfile.gettempdir()} is too "
        "long and /tmp is not writable. Set TMPDIR to a folder of at most 25 characters."
    )


def _probe(address: str) -> None:
    """Raises unless something listens; Ray itself retries for minutes without a word."""
    match = re.fullmatch(r"(?:ray://)?(?P<host>[^:/]+):(?P<port>\d+)", address)
    if not match:
        return  # "auto": Ray looks for a cluster on this machine.
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=5).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"RAY_ADDRESS={address}: nothing answers there ({error}). Start a cluster with "
            "`ray start --head`, correct the address, or unset it to use this machine only."
        ) from error
