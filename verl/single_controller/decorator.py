"""How a call on a `WorkerGroup` spreads over its workers: two modes, chosen at the method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, TypeVar

from verl.protocol import DataProto

Method = TypeVar("Method", bound=Callable[..., Any])
_MODE = "_dispatch_mode"


class Dispatch(Enum):
    """What each worker receives, and what the caller gets back."""

    ALL = "all"
    """The same arguments for every worker. Returns a list with one result a rank."""
    DP = "dp"
    """Every `DataProto` argument is split over the data-parallel groups; ranks that share one
    sequence receive the same part. A list of as many `DataProto` as there are groups counts as
    already split. Other arguments go to all. Returns the results of the first rank of each group
    in order: concatenated if they are `DataProto`, otherwise as a list."""


def dispatch(mode: Dispatch) -> Callable[[Method], Method]:
    """Marks a method of a `Worker` as callable through its `WorkerGroup`."""

    def mark(method: Method) -> Method:
        setattr(method, _MODE, mode)
        return method

    return mark


def dispatched_methods(worker_cls: type) -> dict[str, Dispatch]:
    """Marked methods of a worker class, by name."""
    modes: dict[str, Dispatch] = {}
    for name in dir(worker_cls):
        # An override without the decorator keeps the mode of the method that it overrides.
        found = [vars(c)[name] for c in worker_cls.__mro__ if name in vars(c)]
        mode = next((getattr(m, _MODE) for m in found if hasattr(m, _MODE)), None)
        if mode is not None:
            modes[name] = mode
    return modes


def split_arguments(values: Sequence[Any], dp_size: int, method: str) -> list[list[Any]]:
    """The arguments of each data-parallel group, for a method in mode `Dispatch.DP`.

    Raises:
        TypeError: there is no `DataProto` to split.
        ValueError: a list of batches is not as long as there are groups.
    """
    if not any(_is_batch(v) or _is_list_of_batches(v) for v in values):
        raise TypeError(
            f"{method}() splits its data over the workers but got no DataProto; pass one, or mark "
            "the method with Dispatch.ALL."
        )
    columns = [_spread(v, dp_size, method) for v in values]
    return [list(row) for row in zip(*columns, strict=True)]


def merge_results(results: Sequence[Any]) -> Any:
    """Results of the groups in order: one `DataProto` if all are, otherwise the list."""
    if results and all(_is_batch(r) for r in results):
        return DataProto.concat(results)
    return list(results)


def _spread(value: Any, dp_size: int, method: str) -> Sequence[Any]:
    if _is_batch(value):
        return value.split(dp_size)
    if not _is_list_of_batches(value):
        return [value] * dp_size
    if len(value) != dp_size:
        raise ValueError(
            f"{method}() got a list of {len(value)} batches for {dp_size} data-parallel groups; "
            f"pass one DataProto or a list of {dp_size}."
        )
    return value


def _is_batch(value: Any) -> bool:
    return isinstance(value, DataProto)


def _is_list_of_batches(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_batch(v) for v in value)
