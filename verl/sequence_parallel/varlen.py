"""Where sequences of different lengths begin in a row, as variable-length kernels take it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise

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

    def runs(self, least_scores: int) -> list[tuple[bool, Varlen, slice, slice]]:
        """Long sequences one by one, and the others in runs: (is long, sequences, queries, keys).

        Long is a sequence whose queries times keys are at least `least_scores`.
        """
        if least_scores not in self._runs:
            self._runs[least_scores] = list(self._cut(least_scores))
        return self._runs[least_scores]

    @cached_property
    def _runs(self) -> dict[int, list[tuple[bool, Varlen, slice, slice]]]:
        """Kept, since every layer asks for the same."""
        return {}

    def _cut(self, least_scores: int) -> Iterator[tuple[bool, Varlen, slice, slice]]:
        spans = list(self.slices())

        def kind(i: int) -> tuple[bool, int]:
            is_long = self.query_lens[i] * self.key_lens[i] >= least_scores
            return is_long, i if is_long else -1

        for (is_long, _), numbers in groupby(range(len(spans)), kind):
            run = list(numbers)
            first, last = spans[run[0]], spans[run[-1]]
            lens = [[lens[i] for i in run] for lens in (self.query_lens, self.key_lens)]
            yield (
                is_long,
                Varlen.of(lens[0], lens[1], self.cu_queries.device),
                slice(first[0].start, last[0].stop),
                slice(first[1].start, last[1].stop),
            )
