"""What all tests share: an offline, single-threaded environment, Ray, and groups of processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Before torch, transformers and Ray are imported; processes that tests start inherit them.
os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
)

# A job started with `&` or nohup ignores Ctrl-C, and would hand that on to the runs it interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from verl.utils.processes import ray_session


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Entry points set logging up for their whole process; other tests must not notice."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster on this machine with 4 CPUs, whatever the machine has."""
    with ray_session(num_cpus=4, object_store_gib=0.1):
        yield


def run_gloo(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Runs `fn(rank, world_size, *args)` in processes that share a gloo group; results by rank.

    `fn` must be importable (defined at the top of a module). Results and arguments are pickled.

    Raises:
        Exception: the first that any process raises, with its rank and traceback as a note.
        TimeoutError: not all processes ended in time.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], {}
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            run = (fn, rank, world_size, f"{folder}/rendezvous", timeout_s, writer, args)
            processes.append(context.Process(target=_gloo_process, args=run, daemon=True))
            processes[-1].start()
            writer.close()  # so that the end of the process ends the pipe
            pipes[reader] = rank
        try:
            return _gather(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _gather(pipes: dict[Connection, int], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while pipes:
        ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pipes.values())} did not end in time")
        for pipe in ready:
            rank = pipes.pop(pipe)  # type: ignore[call-overload]
            try:
                value, error, trace = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if error is not None:
                error.add_note(f"Raised by rank {rank}:\n{trace}")
                raise error
            results[rank] = value
    return [results[rank] for rank in sorted(results)]


def _gloo_process(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout_s: float,
    writer: Connection,
    args: tuple[Any, ...],
) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=Path(rendezvous).as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        answer = (fn(rank, world_size, *args), None, "")
    except BaseException as error:
        answer = (None, error, traceback.format_exc())
    # Plain pickle: torch's own would share the memory of a process that is about to end.
    writer.send_bytes(pickle.dumps(answer))
    if answer[1] is None:
        dist.barrier()  # a peer may still be reading from this process
        dist.destroy_process_group()
