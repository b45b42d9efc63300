"""All ranks encode together what a batch needs: shared out by patches, gathered, written once.

Letters: M visual tokens, E hidden size. Every function here is a collective of all ranks. Ranks
take the same decisions, since these follow from what was gathered from all of them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.data.media import MediaItem
from verl.utils.exits import UserError
from verl.workers.encode_plan import Slice, cut, plan_slices, rounds

CHUNKS = (1, 8, 16, 32, 64, 128)
_ROUND = 64
"""A round of media has so many blocks a rank: what a rank holds at once."""


class ParallelEncoder:
    """Shares the encoding of media out over all ranks.

    `encode(items, slices)` gives the features of some slices, concatenated (M, E), on `device`.
    `write(item, features)` keeps what was gathered; one rank of each machine calls it.
    A rank that raises ends the call on all ranks, with its reason.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[MediaItem], Sequence[Slice]], Tensor],
        write: Callable[[MediaItem, Tensor], Any],
        *,
        device: torch.device,
        merge_size: int,
        block_patches: int,
        num_chunk_seq: int = -1,
    ) -> None:
        """
        Args:
            block_patches: what is never shared out between ranks, see `encode_plan`.
            num_chunk_seq: parts in which a rank's features of a piece of media are gathered; -1: by
                free memory.
        """
        self._encode = encode
        self._write = write
        self._device = device
        self._merge = merge_size
        self._block = block_patches
        self._n_chunks = num_chunk_seq
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._machines = _machines()

    def run(
        self, items: Sequence[MediaItem], is_stored: Callable[[MediaItem], bool]
    ) -> tuple[list[MediaItem], list[MediaItem]]:
        """Encodes what a rank needs and its machine lacks.

        Each machine is given what its own ranks need, once, and nothing else. Returns the pieces of
        media that were encoded, and those of them that `write` refused (returned False).

        Every rank must call it, also with no items.
        """
        absent = _agreed(lambda: {i.ref.key: i for i in items if not is_stored(i)})
        wanted = {key: item for share in absent for key, item in share.items()}
        todo = [wanted[key] for key in sorted(wanted)]
        writers = [
            [
                ranks[i % len(ranks)]
                for ranks in self._machines
                if any(item.ref.key in absent[rank] for rank in ranks)
            ]
            for i, item in enumerate(todo)
        ]
        grids = [item.grid_thw for item in todo]
        refused: list[MediaItem] = []
        for part in rounds(grids, self._block * self._world * _ROUND):
            refused += self._round([todo[i] for i in part], [writers[i] for i in part])
        return todo, refused

    def _round(self, items: list[MediaItem], writers: list[list[int]]) -> list[MediaItem]:
        """Encodes some media; `writers` are the ranks that each of them is gathered on.

        Returns those that a writer refused.
        """
        grids = [item.grid_thw for item in items]
        plan = plan_slices(grids, self._world, self._block)
        shares = _agreed(lambda: self._encode(items, plan[self._rank]))
        features_ME, (width, dtype) = shares.own, _described(shares)
        chunks = self._chunks(items, width, dtype)
        done = 0
        mine: dict[int, Tensor] = {}
        for i, item in enumerate(items):
            gathered = None
            if self._rank in writers[i]:
                gathered = mine[i] = torch.empty(item.n_tokens, width, dtype=dtype)
            for rank, slices in enumerate(plan):
                for part in (s for s in slices if s.item == i):
                    start, stop = self._rows(item, part)
                    for a, b in cut(start, stop, chunks):
                        own = None
                        if rank == self._rank:
                            own = features_ME[done + a - start : done + b - start]
                        for writer in writers[i]:
                            self._hand_over(rank, writer, own, gathered, (a, b))
                    done += (stop - start) * (rank == self._rank)
        # Every rank writes its own at the same time: a disk is slower than a tower.
        kept = _agreed(lambda: {i: bool(self._write(items[i], mine.pop(i))) for i in list(mine)})
        refused = {i for share in kept for i, ok in share.items() if not ok}
        return [items[i] for i in sorted(refused)]

    def _hand_over(
        self, source: int, writer: int, own: Tensor | None, into: Tensor | None, at: tuple[int, int]
    ) -> None:
        """Rows from the rank that has them to one that writes; all ranks in the same order."""
        if self._rank == source:
            assert own is not None
            if writer != source:
                dist.send(_bytes(own), writer)
                return
            assert into is not None
            into[slice(*at)] = own
        elif self._rank == writer:
            assert into is not None
            part = _bytes(into[slice(*at)])
            received = torch.empty_like(part, device=self._device)
            dist.recv(received, source)
            part.copy_(received)

    def _rows(self, item: MediaItem, part: Slice) -> tuple[int, int]:
        _, h, w = item.grid_thw
        size = h * w // self._merge**2
        return part.start * size, part.stop * size

    def _chunks(self, items: list[MediaItem], width: int, dtype: torch.dtype) -> int:
        if self._n_chunks > 0:
            return self._n_chunks
        free = torch.tensor(_free_bytes(), device=self._device)
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
        return chunks_for(max(i.n_tokens for i in items) * width * dtype.itemsize, int(free))


def chunks_for(n_bytes: int, free_bytes: int) -> int:
    """The smallest number of parts of which each takes at most an eighth of the free memory."""
    fitting = (n for n in CHUNKS if n_bytes <= n * (free_bytes // 8))
    return next(fitting, CHUNKS[-1])


class _Shares(list[Any]):
    """What each rank told of its result, by rank, and this rank's own result."""

    own: Any


def _agreed(work: Callable[[], Any]) -> _Shares:
    """Does `work` on every rank; raises on all ranks when it raises on one.

    Tensors stay where they are: others learn their width and dtype.
    """
    own, error, reason = None, None, None
    try:
        own = work()
    except Exception as raised:
        error, reason = raised, str(raised) or repr(raised)
    told = (own.shape[1], own.dtype) if isinstance(own, Tensor) else own
    answers = _gathered((told, reason))
    if error is not None:
        raise error
    for rank, (_, failed) in enumerate(answers):
        if failed is not None:
            raise UserError(f"rank {rank} could not encode its part of the batch: {failed}")
    shares = _Shares(told for told, _ in answers)
    shares.own = own
    return shares


def _described(shares: Sequence[tuple[int, torch.dtype]]) -> tuple[int, torch.dtype]:
    """Width and dtype of the features of whoever has some."""
    return max(shares, key=lambda share: share[0])


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _machines() -> list[list[int]]:
    """Ranks of each machine, the machines in the order of their first rank."""
    machines: dict[str, list[int]] = {}
    for rank, name in enumerate(_gathered(_machine())):
        machines.setdefault(name, []).append(rank)
    return list(machines.values())


def _machine() -> str:
    """Name of this machine; containers of one host see different disks, hence the host name."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # two machines may have the same host name
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _bytes(rows_ME: Tensor) -> Tensor:
    """Contiguous rows as bytes, (n,): gloo knows few dtypes."""
    return rows_ME.view(torch.uint8).flatten()


def _free_bytes() -> int:
    """Host memory that could be taken now."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
