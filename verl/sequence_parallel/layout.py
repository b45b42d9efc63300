"""How the segments of a packed row continue each other: a forest, laid out depth first.

A segment sees itself causally and all of every segment that it continues. A sequence alone is a
root without children; a group of responses is a prompt with children; questions about one video are
children of the video, and responses theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

ROOT = -1
"""As a parent: the segment begins a sequence."""


@dataclass(frozen=True)
class Layout:
    """Lengths of the segments in the order of the row, and which segment each continues.

    Raises ValueError for segments that do not stand depth first behind what they continue.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.parents) or min(self.lengths, default=0) < 0:
            raise ValueError(f"a row of segments {self.lengths} with parents {self.parents}")
        path: list[int] = []
        for i, parent in enumerate(self.parents):
            while path and path[-1] != parent:
                path.pop()
            if parent != ROOT and not path:
                raise ValueError(
                    f"segment {i} continues segment {parent}, which does not stand before it with "
                    f"only its own branches between: parents {self.parents}"
                )
            path.append(i)

    @classmethod
    def of_groups(
        cls, prompt_lens: Sequence[int], response_lens: Sequence[Sequence[int]]
    ) -> Layout:
        """Prompts, each followed by its responses."""
        lengths: list[int] = []
        parents: list[int] = []
        for n_prompt, lens in zip(prompt_lens, response_lens, strict=True):
            prompt = len(lengths)
            lengths += [n_prompt, *lens]
            parents += [ROOT, *[prompt] * len(lens)]
        return cls(tuple(lengths), tuple(parents))

    @classmethod
    def of_tensor(cls, tree_2n: Tensor) -> Layout:
        """What `as_tensor` gave."""
        lengths, parents = tree_2n.tolist()
        return cls(tuple(lengths), tuple(parents))

    @cached_property
    def as_tensor(self) -> Tensor:
        """Lengths and parents, (2, segments) int64 on the host, as an operator takes them."""
        return torch.tensor([self.lengths, self.parents], dtype=torch.int64)

    @property
    def size(self) -> int:
        """Tokens of the row."""
        return sum(self.lengths)

    @property
    def n_pairs(self) -> int:
        """Pairs of a query and a key that it sees: what attention costs, per head and width."""
        return sum(
            n * (n + 1) // 2 + n * sum(self.lengths[j] for j in self.ancestors(i))
            for i, n in enumerate(self.lengths)
        )

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of every segment."""
        return list(pairwise([0, *accumulate(self.lengths)]))

    @cached_property
    def depths(self) -> list[int]:
        """How many segments each one continues."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == ROOT else depths[parent] + 1)
        return depths

    @cached_property
    def branch_ends(self) -> list[int]:
        """Where the last segment ends that continues each one."""
        ends = [end for _, end in self.spans]
        for i in reversed(range(len(ends))):
            if self.parents[i] != ROOT:
                ends[self.parents[i]] = max(ends[self.parents[i]], ends[i])
        return ends

    def ancestors(self, segment: int) -> list[int]:
        """The segments that one continues, the first of the sequence first."""
        found = []
        while (segment := self.parents[segment]) != ROOT:
            found.append(segment)
        return found[::-1]
