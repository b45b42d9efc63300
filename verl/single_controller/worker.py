"""A worker process: its base class, and the Ray actor that hosts it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from verl.single_controller.decorator import Dispatch, dispatch
from verl.single_controller.failures import Failure

DEFAULT_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class Worker:
    """One process of a group. Subclasses add methods marked with `@dispatch`.

    `rank` of `world_size`; `dp_rank` of `dp_size` says which part of the data it works on. Ranks
    with the same `dp_rank` share their sequences and follow each other.
    """

    def __init__(
        self, *, rank: int, world_size: int, device: str, dp_rank: int, dp_size: int
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        # Ray shows each worker only the device that it may use, hence always the first one.
        self.device = torch.device("cuda:0" if device == "cuda" else device)
        self._store: TCPStore | None = None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @dispatch(Dispatch.ALL)
    def init_process_group(
        self, address: tuple[str, int], backend: str | None = None, timeout_s: float = 1800
    ) -> None:
        """Joins the default process group of `torch.distributed`. A collective.

        Args:
            address: of the store that rank 0 opened with `open_store`.
            backend: null means gloo on the CPU, and nccl with gloo beside it on CUDA.
            timeout_s: limit of every collective.
        """
        host, port = address
        timeout = timedelta(seconds=timeout_s)
        store = self._store or TCPStore(host, port, is_master=False, timeout=timeout)
        interface = _interface_of(node_address())
        if interface:
            # Gloo would ask what the host name resolves to, which is loopback on many machines.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        dist.init_process_group(
            backend or DEFAULT_BACKENDS[self.device.type],
            store=store, rank=self.rank, world_size=self.world_size, timeout=timeout,
        )  # fmt: skip

    def open_store(self) -> tuple[str, int]:
        """Opens the store of the process group on a free port and keeps it: (host, port).

        The port is never released between choosing and using it, so nobody else can take it.
        """
        host = node_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    @dispatch(Dispatch.ALL)
    def ping(self) -> int:
        """The process id; answers when the worker is alive and idle."""
        return os.getpid()


class Host:
    """The Ray actor around a worker: builds it, calls it and reports what it raises.

    Exceptions travel as values. Ray would wrap them in classes made on the fly, and lose those
    whose constructor takes more than a message.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._worker: Worker | None = None
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
        )

    def __repr__(self) -> str:
        return self._name  # Ray's prefix of every line that this worker prints

    def build(self, worker_cls: type[Worker], kwargs: dict[str, Any]) -> Failure | None:
        """Constructs the worker."""
        try:
            self._worker = worker_cls(**kwargs)
        except Exception as error:
            return Failure.of(error)
        return None

    def execute(self, method: str, keep_result: bool, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the worker: its result (None unless kept), or a `Failure`."""
        try:
            result = getattr(self._worker, method)(*args, **kwargs)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            # torch's CheckpointException is not an Exception, hence the wide clause.
            return Failure.of(error)
        return result if keep_result else None


def node_address() -> str:
    """IP address of this node as the Ray cluster knows it."""
    # ray.util.get_node_ip_address() asks the network for a route to the internet instead.
    node_id = ray.get_runtime_context().get_node_id()
    return next(n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node_id)


def _interface_of(address: str) -> str | None:
    """Name of the network interface that owns an IP address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family in (socket.AF_INET, socket.AF_INET6) and a.address == address
               for a in addresses):  # fmt: skip
            return name
    return None
