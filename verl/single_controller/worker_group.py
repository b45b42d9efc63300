"""A group of worker processes that live and die together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import ray
from ray import ObjectRef
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.protocol import DataProto
from verl.single_controller.decorator import (
    Dispatch,
    dispatched_methods,
    merge_results,
    split_arguments,
)
from verl.single_controller.failures import Died, Failure, explain, failed, outcome
from verl.single_controller.placement import place, worker_environment
from verl.single_controller.worker import Host, Worker


class GroupFuture:
    """The pending call of one method on all workers."""

    def __init__(
        self, group: WorkerGroup, method: str, refs: Sequence[ObjectRef], dp: bool
    ) -> None:
        self._group, self._method, self._refs, self._dp = group, method, list(refs), dp

    def done(self) -> bool:
        """Whether `result` would return, or raise, at once."""
        ready, pending = ray.wait(self._refs, num_returns=len(self._refs), timeout=0)
        return not pending or any(failed(outcome(ref)) for ref in ready)

    def result(self) -> Any:
        """Waits for all workers and returns as the dispatch mode says.

        Raises:
            WorkerDied: a worker ended. Raised within seconds, also while others hang.
            Exception: what a worker raised, with its rank and traceback as a note.
        """
        results = self._group._wait(self._method, self._refs)
        if not self._dp:
            return results
        return merge_results(results[:: self._group.sequence_group_size])


class RemoteMethod:
    """A method of all workers: call it to wait for the result, `.remote(...)` not to."""

    def __init__(self, group: WorkerGroup, name: str) -> None:
        self._group, self._name = group, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.remote(*args, **kwargs).result()

    def remote(self, *args: Any, **kwargs: Any) -> GroupFuture:
        """Starts the call and returns its future."""
        return self._group.call_async(self._name, *args, **kwargs)


class WorkerGroup:
    """`world_size` processes of one worker class, their process group already initialised.

    Methods marked with `@dispatch` are attributes of the group: `group.update(batch)`. When one
    worker dies or raises, all are killed and the group cannot be used any more.
    """

    def __init__(
        self,
        worker_cls: type[Worker],
        world_size: int,
        *,
        device: str = "cpu",
        init_kwargs: Mapping[str, Any] | None = None,
        num_cpus_per_worker: float = 1,
        env_vars: Mapping[str, str] | None = None,
        sequence_group_size: int = 1,
        collective_timeout_s: float = 1800,
    ) -> None:
        """Starts the workers; returns when all have joined the process group.

        Args:
            worker_cls: constructed in each process with `init_kwargs` and what `Worker` takes.
            device: "cuda" gives each worker one GPU, "cpu" none.
            sequence_group_size: neighbouring ranks that share one part of the data.
            collective_timeout_s: limit of every collective of the default process group.

        Raises:
            ValueError: `world_size` is not a multiple of `sequence_group_size`.
            ResourcesMissing: the Ray cluster is too small; says what is missing.
            WorkerDied: a worker ended while starting.
        """
        if world_size < 1 or world_size % sequence_group_size:
            raise ValueError(
                f"{world_size} workers cannot form groups of {sequence_group_size} that share a "
                "sequence; the number of workers must be a multiple."
            )
        self.world_size = world_size
        self.sequence_group_size = sequence_group_size
        self.dp_size = world_size // sequence_group_size
        self._name = worker_cls.__name__
        self._modes = dispatched_methods(worker_cls)
        self._hosts: list[Any] = []
        self._closed = ""
        gpus = 1 if device == "cuda" else 0
        self._placement, bundles = place(world_size, num_cpus_per_worker, gpus)
        try:
            env = worker_environment(world_size, device, env_vars or {})
            for rank, bundle in enumerate(bundles):
                self._hosts.append(self._start_host(rank, bundle, num_cpus_per_worker, gpus, env))
            self._build(worker_cls, device, init_kwargs or {})
            store = self._hosts[0].execute.remote("open_store", True)
            address = self._wait("open_store", [store])[0]
            self.call("init_process_group", address, timeout_s=collective_timeout_s)
        except BaseException:
            self.shutdown()
            raise

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def __getattr__(self, name: str) -> RemoteMethod:
        if name not in self.__dict__.get("_modes", {}):
            raise AttributeError(f"{type(self).__name__} has no method {name!r} to dispatch.")
        return RemoteMethod(self, name)

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a dispatched method by name and waits; see `GroupFuture.result`."""
        return self.call_async(method, *args, **kwargs).result()

    def call_async(self, method: str, /, *args: Any, **kwargs: Any) -> GroupFuture:
        """Starts a dispatched method by name. Workers run the calls they get in order."""
        if self._closed:
            raise RuntimeError(f"Cannot call {method}(): the workers are gone ({self._closed}).")
        if method not in self._modes:
            raise AttributeError(
                f"{self._name} has no dispatched method {method!r}; it has {sorted(self._modes)}."
            )
        dp = self._modes[method] is Dispatch.DP
        spread = self._spread_dp if dp else self._spread_all
        calls = spread(method, args, kwargs)
        refs = [
            host.execute.remote(method, not dp or rank % self.sequence_group_size == 0, *a, **kw)
            for rank, (host, (a, kw)) in enumerate(zip(self._hosts, calls, strict=True))
        ]
        return GroupFuture(self, method, refs, dp)

    def check(self) -> None:
        """Raises `WorkerDied` if a worker has died; for long phases in which none is called."""
        self.call("ping")

    def shutdown(self, reason: str = "shut down") -> None:
        """Ends all workers at once. Harmless when repeated."""
        if self._closed:
            return
        self._closed = reason
        for host in self._hosts:
            ray.kill(host, no_restart=True)
        remove_placement_group(self._placement)

    def _start_host(
        self, rank: int, bundle: int, cpus: float, gpus: int, env: dict[str, str]
    ) -> Any:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._placement, placement_group_bundle_index=bundle
        )
        actor = ray.remote(Host).options(
            num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy,
            max_restarts=0, max_task_retries=0, runtime_env={"env_vars": env},
        )  # fmt: skip
        return actor.remote(f"{self._name} rank {rank}")

    def _build(self, worker_cls: type[Worker], device: str, init_kwargs: Mapping[str, Any]) -> None:
        refs = []
        for rank, host in enumerate(self._hosts):
            place_in_group = {
                "rank": rank, "world_size": self.world_size, "device": device,
                "dp_rank": rank // self.sequence_group_size, "dp_size": self.dp_size,
            }  # fmt: skip
            refs.append(host.build.remote(worker_cls, {**init_kwargs, **place_in_group}))
        self._wait("__init__", refs)

    def _spread_all(self, method: str, args: tuple, kwargs: dict) -> list[tuple[list, dict]]:
        args_once = [_put_once(a) for a in args]
        kwargs_once = {k: _put_once(v) for k, v in kwargs.items()}
        return [(args_once, kwargs_once)] * self.world_size

    def _spread_dp(self, method: str, args: tuple, kwargs: dict) -> list[tuple[list, dict]]:
        names = list(kwargs)
        calls = []
        for values in split_arguments([*args, *kwargs.values()], self.dp_size, method):
            # One object a group: its ranks read the same copy in shared memory.
            once = [_put_once(v) for v in values]
            call = once[: len(args)], dict(zip(names, once[len(args) :], strict=True))
            calls += [call] * self.sequence_group_size
        return calls

    def _wait(self, method: str, refs: Sequence[ObjectRef]) -> list[Any]:
        """Results by rank. The first failure ends the group."""
        ranks = {ref: rank for rank, ref in enumerate(refs)}
        pending = dict(ranks)
        results: dict[int, Any] = {}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=60)
            for ref in ready:
                rank = pending.pop(ref)
                results[rank] = value = outcome(ref)
                if failed(value):
                    self._fail(method, *explain(rank, value, pending))
        return [results[rank] for rank in sorted(results)]

    def _fail(self, method: str, rank: int, failure: Died | Failure) -> NoReturn:
        self.shutdown(f"rank {rank} failed in {method}()")
        raise failure.exception(rank, method)


def _put_once(value: Any) -> Any:
    """Batches go to the object store once; small arguments travel with each call."""
    return ray.put(value) if isinstance(value, DataProto) else value
