"""Which worker trains on which samples, so that all are done at about the same time.

Attention's cost is quadratic in the prompt, so equal counts of samples or tokens are unequal work.
Samples of one group stay together, since they share their prompt's computation; groups that show
the same media do as well. A group is cut only where workers would have nothing to do, or where that
makes the slowest one faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from verl.models.shape import TextShape
from verl.protocol import DataProto
from verl.sequence_parallel.layout import ROOT, Layout

WORTH = 0.98
"""What a cut must bring the slowest worker's time down to, of what it was."""
Value = TypeVar("Value")
Shares = list[list[int]]
"""Indices of samples for each worker."""


@dataclass(frozen=True)
class _Unit:
    """Samples that one worker gets together."""

    samples: tuple[int, ...]
    cost: float


class CostModel:
    """Floating-point operations of training on some samples, in any fixed unit."""

    def __init__(self, shape: TextShape, *, shared_prefix: bool) -> None:
        self._shape, self._shared = shape, shared_prefix

    def of(self, batch: DataProto, samples: Sequence[int]) -> float:
        """Of neighbouring samples of a batch in one row."""
        layout = self._layout(batch, samples)
        return self._shape.forward_flops(layout.size, layout.n_pairs)

    def _layout(self, batch: DataProto, samples: Sequence[int]) -> Layout:
        """The row's segments; what several prompts share is taken to be their media."""
        lengths: list[int] = []
        parents: list[int] = []

        def segment(n: int, parent: int) -> int:
            lengths.append(n)
            parents.append(parent)
            return len(lengths) - 1

        prompts = [list(g) for _, g in groupby(samples, lambda i: batch["uid"][i])]
        if not self._shared:
            prompts = [[i] for i in samples]
        before, n_before = ROOT, 0
        if self._shared and len(prompts) > 1 and (media := batch["media"][samples[0]]):
            n_before = sum(item.n_tokens for item in media)
            before = segment(n_before, ROOT)
        for group in prompts:
            own = max(0, len(batch["prompt_ids"][group[0]]) - n_before)
            prompt = segment(own, before)
            for i in group:
                segment(len(batch["response_ids"][i]), prompt)
        return Layout(tuple(lengths), tuple(parents))


def deal(batch: DataProto, minis: Sequence[int], n_workers: int, cost: CostModel) -> Shares:
    """Every sample to one worker, each mini-batch spread for itself.

    `minis[i]` is the mini-batch of sample i; samples of a group, and groups about the same media,
    are neighbours. Within a worker's share samples keep their order.
    """
    shares: Shares = [[] for _ in range(n_workers)]
    for _, members in groupby(range(len(batch)), lambda i: minis[i]):
        units = _spread(_units(batch, list(members), cost), n_workers, batch, cost)
        for share, own in zip(shares, units, strict=True):
            share.extend(sorted(i for unit in own for i in unit.samples))
    return shares


def in_order(values: Sequence[Value], shares: Shares) -> list[Value]:
    """What the workers gave, one after another, in the order of the samples."""
    places = [i for share in shares for i in share]
    return [value for _, value in sorted(zip(places, values, strict=True), key=lambda p: p[0])]


def imbalance(batch: DataProto, shares: Shares, cost: CostModel) -> float:
    """The slowest worker's work over the mean's; 1 is even."""
    works = [sum(u.cost for u in _units(batch, share, cost)) for share in shares]
    mean = sum(works) / len(works)
    return max(works) / mean if mean else 1.0


def _units(batch: DataProto, samples: Sequence[int], cost: CostModel) -> list[_Unit]:
    def key(i: int) -> tuple[object, ...]:
        media = batch["media"][i]
        return tuple(item.ref.key for item in media) if media else (batch["uid"][i],)

    found = [tuple(members) for _, members in groupby(samples, key)]
    return [_Unit(members, cost.of(batch, members)) for members in found]


def _spread(
    units: list[_Unit], n_workers: int, batch: DataProto, cost: CostModel
) -> list[list[_Unit]]:
    """Largest first, each to the worker with least work; then large ones are cut while it helps."""
    best = tried = _assign(units, n_workers)
    for _ in range(2 * n_workers):
        largest = max(_slowest(tried), key=lambda u: u.cost, default=None)
        if largest is None or len(largest.samples) < 2 or n_workers == 1:
            break
        half = len(largest.samples) // 2
        parts = [largest.samples[:half], largest.samples[half:]]
        units = [u for u in units if u is not largest]
        units += [_Unit(part, cost.of(batch, part)) for part in parts]
        tried = _assign(units, n_workers)
        # A cut computes the prompt once more, so it must be worth something.
        if _makespan(tried) < WORTH * _makespan(best):
            best = tried
    return best


def _assign(units: Sequence[_Unit], n_workers: int) -> list[list[_Unit]]:
    shares: list[list[_Unit]] = [[] for _ in range(n_workers)]
    works = [0.0] * n_workers
    for unit in sorted(units, key=lambda u: (-u.cost, u.samples)):
        worker = min(range(n_workers), key=works.__getitem__)
        shares[worker].append(unit)
        works[worker] += unit.cost
    return shares


def _slowest(shares: list[list[_Unit]]) -> list[_Unit]:
    return max(shares, key=lambda own: sum(u.cost for u in own))


def _makespan(shares: list[list[_Unit]]) -> float:
    return sum(u.cost for u in _slowest(shares))
