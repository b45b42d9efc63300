"""Where sequences of different lengths begin in a row, as variable-length kernels take it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from verl.utils.torch_functional import to_device


@dataclass(frozen=True)
class Varlen:
    """Sequences one after the other, each with its queries and its keys."""

    query_lens: tuple[int, ...]
    key_lens: tuple[int, ...]
    cu_queries: Tensor
    """Running sum of the numbers of queries, from 0, int32, on the device."""
    cu_keys: Tensor

    @classmethod
    def of(cls, query_lens: Sequence[int], key_lens: Sequence[int], device: torch.device) -> Varlen:
        """Sequences with so many queries and keys; the host does not wait for the device."""
        sums = [
            to_device(torch.tensor([0, *accumulate(lens)], dtype=torch.int32), device)
            for lens in (query_lens, key_lens)
        ]
        return cls(tuple(query_lens), tuple(key_lens), *sums)

    @property
    def longest_query(self) -> int:
        return max(self.query_lens)

    @property
    def longest_key(self) -> int:
        return max(self.key_lens)

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """Queries and keys of each sequence."""
        starts = [pairwise([0, *accumulate(lens)]) for lens in (self.query_lens, self.key_lens)]
        for queries, keys in zip(*starts, strict=True):
            yield slice(*queries), slice(*keys)
