"""`DataProto`, the ragged batch that crosses Ray.

A batch is a dictionary of columns of equal length. A column is a list of 1-D tensors of one dtype,
each as long as its sample needs (never padded to a maximum), or a list of any Python objects.
Media travel as references, so a batch is small whatever the length of its videos.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DataProto:
    """Columns of equal length and a `meta` dictionary that holds for all samples alike.

    No method changes the batch it is called on: each returns a new one that may share tensors
    with the old one, `split` and `chunk_by` excepted.
    """

    def __init__(
        self, columns: Mapping[str, Iterable[Any]], meta: Mapping[str, Any] | None = None
    ) -> None:
        """Takes columns by name.

        Raises:
            ValueError: columns differ in length, or a tensor column is not 1-D of one dtype.
        """
        self._columns = {key: list(values) for key, values in columns.items()}
        self.meta: dict[str, Any] = dict(meta or {})
        _check_lengths(self._columns)
        for key, values in self._columns.items():
            _check_tensors(key, values)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), []))

    def __contains__(self, key: object) -> bool:
        return key in self._columns

    def __iter__(self) -> Iterator[str]:
        raise TypeError("Iterate over batch.keys() or over one column, batch['key'].")

    def __getitem__(self, key: str) -> list[Any]:
        if key not in self._columns:
            raise KeyError(f"The batch has no column {key!r}; it has {sorted(self._columns)}.")
        return self._columns[key]

    def __repr__(self) -> str:
        kinds = ", ".join(f"{key}: {_kind(values)}" for key, values in self._columns.items())
        return f"DataProto({len(self)} samples; {kinds}; meta={sorted(self.meta)})"

    def __reduce__(self) -> tuple[Any, ...]:
        packed = {key: _pack(values) for key, values in self._columns.items()}
        return _unpack_batch, (packed, self.meta)

    def keys(self) -> list[str]:
        """Names of the columns."""
        return list(self._columns)

    def select(self, keys: Sequence[str]) -> DataProto:
        """Only the named columns."""
        return DataProto({key: self[key] for key in keys}, self.meta)

    def take(self, indices: Iterable[int]) -> DataProto:
        """Samples by index, in the given order; an index may repeat.

        Raises:
            IndexError: an index is negative or too large.
        """
        order = [int(i) for i in indices]
        wrong = [i for i in order if not 0 <= i < len(self)]
        if wrong:
            raise IndexError(f"Index {wrong[0]} is outside of a batch of {len(self)} samples.")
        return DataProto({k: [v[i] for i in order] for k, v in self._columns.items()}, self.meta)

    def split(self, n: int) -> list[DataProto]:
        """`n` contiguous parts whose sizes differ by at most 1, the larger ones first.

        Parts are empty when there are more of them than samples.
        """
        if n < 1:
            raise ValueError(f"Cannot split a batch into {n} parts; use 1 or more.")
        size, larger = divmod(len(self), n)
        return self.chunk_by([size + (i < larger) for i in range(n)])

    def chunk_by(self, sizes: Sequence[int]) -> list[DataProto]:
        """Contiguous parts of the given sizes, which must add up to the whole batch.

        Tensors are cloned, so that a part keeps only its own memory alive; samples of a part that
        shared one share its clone.
        """
        if min(sizes, default=0) < 0 or sum(sizes) != len(self):
            raise ValueError(
                f"Part sizes {list(sizes)} add up to {sum(sizes)}; "
                f"the batch has {len(self)} samples."
            )
        bounds = list(accumulate(sizes, initial=0))
        return [
            DataProto({k: _cloned(v[a:b]) for k, v in self._columns.items()}, self.meta)
            for a, b in pairwise(bounds)
        ]

    @staticmethod
    def concat(parts: Sequence[DataProto]) -> DataProto:
        """The samples of all parts in order. Parts must agree in columns and in meta."""
        if not parts:
            raise ValueError("Cannot concatenate zero batches.")
        first = parts[0]
        for i, part in enumerate(parts[1:], start=1):
            if set(part.keys()) != set(first.keys()):
                raise ValueError(
                    f"Cannot concatenate: batch {i} {_difference(part.keys(), first.keys())} "
                    "compared with batch 0."
                )
            _check_meta(first.meta, part.meta, f"batch 0 and batch {i}", same_keys=True)
        columns = {key: list(chain.from_iterable(p[key] for p in parts)) for key in first._columns}
        return DataProto(columns, first.meta)

    def union(self, other: DataProto) -> DataProto:
        """The columns and meta of both batches. What both have must be equal."""
        if len(self) != len(other) and self.keys() and other.keys():
            raise ValueError(
                f"Cannot unite a batch of {len(self)} samples with one of {len(other)}."
            )
        for key in other._columns:
            if key in self and not _equal(self[key], other[key]):
                raise ValueError(
                    f"Cannot unite: column {key!r} is in both batches with different values; "
                    "use with_columns to replace it."
                )
        _check_meta(self.meta, other.meta, "the two batches", same_keys=False)
        return DataProto({**self._columns, **other._columns}, {**self.meta, **other.meta})

    def repeat(self, n: int, interleave: bool = True) -> DataProto:
        """Every sample `n` times: a a b b when interleaved, otherwise a b a b."""
        if n < 1:
            raise ValueError(f"Cannot repeat a batch {n} times; use 1 or more.")
        rows = range(len(self))
        if interleave:
            return self.take(i for i in rows for _ in range(n))
        return self.take(i for _ in range(n) for i in rows)

    def with_columns(self, **columns: Iterable[Any]) -> DataProto:
        """The batch with columns added or replaced."""
        return DataProto({**self._columns, **columns}, self.meta)

    def with_meta(self, **meta: Any) -> DataProto:
        """The batch with meta entries added or replaced."""
        return DataProto(self._columns, {**self.meta, **meta})

    def flat(self, key: str) -> tuple[Tensor, Tensor]:
        """A tensor column as (all values in one 1-D tensor, length of each sample as int64).

        An empty batch gives an empty float32 tensor: there is nothing to take a dtype from.
        """
        values = self[key]
        if not values:
            return torch.empty(0), torch.empty(0, dtype=torch.int64)
        if not isinstance(values[0], Tensor):
            raise TypeError(f"Column {key!r} holds {type(values[0]).__name__}, not tensors.")
        return torch.cat(values), torch.tensor([len(v) for v in values])

    def nbytes_per_sample(self) -> list[int]:
        """Bytes of each sample, objects counted as they are pickled."""
        rows = zip(*self._columns.values(), strict=True)
        return [sum(_nbytes(value) for value in row) for row in rows]


def _check_lengths(columns: Mapping[str, list[Any]]) -> None:
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Columns of a batch must have equal lengths, got {lengths}.")


def _check_tensors(key: str, values: list[Any]) -> None:
    dtypes = {v.dtype if isinstance(v, Tensor) else None for v in values}
    if dtypes <= {None}:
        return
    if len(dtypes) > 1:
        names = sorted("objects" if d is None else str(d) for d in dtypes)
        raise ValueError(f"Column {key!r} mixes {' and '.join(names)}; a column holds one kind.")
    for i, value in enumerate(values):
        if value.dim() != 1:
            raise ValueError(
                f"Column {key!r}, sample {i}: shape {tuple(value.shape)}; a batch holds "
                "1-D tensors, each as long as its sample."
            )


def _check_meta(a: Mapping[str, Any], b: Mapping[str, Any], who: str, *, same_keys: bool) -> None:
    if same_keys and set(a) != set(b):
        raise ValueError(f"The meta of {who} differs: the second {_difference(b, a)}.")
    for key in set(a) & set(b):
        if not _equal_value(a[key], b[key]):
            raise ValueError(f"The meta of {who} differs in {key!r}: {a[key]!r} and {b[key]!r}.")


def _difference(keys: Iterable[str], reference: Iterable[str]) -> str:
    missing, extra = sorted(set(reference) - set(keys)), sorted(set(keys) - set(reference))
    words = [f"lacks {missing}"] * bool(missing) + [f"has {extra} in addition"] * bool(extra)
    return " and ".join(words)


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(_equal_value(x, y) for x, y in zip(a, b, strict=True))


def _equal_value(a: Any, b: Any) -> bool:
    """Equality that also works for tensors and arrays, alone or inside of containers."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal_value(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and _equal(a, b)
    return bool(a == b)


def _cloned(values: list[Any]) -> list[Any]:
    clones: dict[int, Any] = {}
    for value in values:
        if id(value) not in clones:
            clones[id(value)] = value.clone() if isinstance(value, Tensor) else value
    return [clones[id(value)] for value in values]


def _kind(values: list[Any]) -> str:
    if not values:
        return "empty"
    first = values[0]
    return str(first.dtype) if isinstance(first, Tensor) else type(first).__name__


def _nbytes(value: Any) -> int:
    return value.nbytes if isinstance(value, Tensor) else len(pickle.dumps(value))


_Packed = tuple[np.ndarray, list[int], torch.dtype, list[int]]
"""Bytes of different tensors, their lengths, their type, and which of them each sample has."""


def _pack(values: list[Any]) -> list[Any] | _Packed:
    """A tensor column as one buffer of bytes: pickled 100 times faster than many small tensors.

    The buffer holds the values only, so a view never carries the storage it points into. A tensor
    that several samples share, such as the prompt of a group, is in it once.
    """
    if not values or not isinstance(values[0], Tensor):
        return values
    different = {id(v): v for v in values}
    place = {key: i for i, key in enumerate(different)}
    flat = torch.cat([v.detach().cpu() for v in different.values()])
    lengths = [len(v) for v in different.values()]
    return flat.view(torch.uint8).numpy(), lengths, flat.dtype, [place[id(v)] for v in values]


def _unpack(packed: list[Any] | _Packed) -> list[Any]:
    if isinstance(packed, list):
        return packed
    data, lengths, dtype, places = packed
    # Ray maps the buffer read-only from shared memory; each tensor gets its own writable memory.
    flat = torch.from_numpy(data.copy()).view(dtype) if data.size else torch.empty(0, dtype=dtype)
    different = [v.clone() for v in flat.split(lengths)]
    return [different[i] for i in places]


def _unpack_batch(packed: dict[str, Any], meta: dict[str, Any]) -> DataProto:
    return DataProto({key: _unpack(values) for key, values in packed.items()}, meta)
