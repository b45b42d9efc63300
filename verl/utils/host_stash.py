"""Tensors of a forward pass that wait in pinned host memory until backward wants them.

Copies run on a stream of their own, beside the computation. Backward takes tensors in the opposite
order, so the ones that come next are fetched while one is used. On a CPU nothing is moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

AHEAD = 2
"""Tensors that leave at a time, and that are fetched before they are taken."""
LEAST_BYTES = 2**20
"""Smaller tensors stay on the device."""
PIECE_BYTES = 2**26
"""Host memory of a tensor is pinned in pieces of this size: torch takes the next power of two."""


@dataclass
class Stashed:
    """A tensor that was put away; `HostStash.take` gives it back."""

    number: int
    on_host: list[Tensor]
    """The values, flat, in pieces."""
    like: Tensor
    """On the meta device."""
    device: torch.device
    fetched: Tensor | None = None
    ready: torch.Event | None = None


class HostStash:
    """Puts tensors of one forward pass away; each is taken back at most once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._waiting: dict[int, Stashed] = {}
        self._leaving: deque[tuple[torch.Event, Tensor]] = deque()
        """Tensors that are being copied to the host: their memory must not be used anew."""
        self._count = 0

    def put(self, tensor: Tensor) -> Stashed | Tensor:
        """A handle for `take`; the tensor itself where it is not worth a copy."""
        if self._stream is None or not tensor.is_cuda or tensor.nbytes < LEAST_BYTES:
            return tensor
        while len(self._leaving) >= AHEAD:
            # The host launches layers far ahead of the device, which would keep all their tensors.
            self._leaving.popleft()[0].synchronize()
        flat = tensor.contiguous().view(-1)
        on_host = []
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            for piece in flat.split(PIECE_BYTES // tensor.element_size()):
                on_host.append(torch.empty_like(piece, device="cpu", pin_memory=True))
                on_host[-1].copy_(piece, non_blocking=True)
            self._leaving.append((self._stream.record_event(), flat))
        like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        stashed = Stashed(self._count, on_host, like, tensor.device)
        self._waiting[self._count] = stashed
        self._count += 1
        return stashed

    def take(self, stashed: Stashed | Tensor) -> Tensor:
        """The tensor, on its device again."""
        if isinstance(stashed, Tensor):
            return stashed
        while self._leaving and self._leaving[0][0].query():
            self._leaving.popleft()
        for number in range(stashed.number, stashed.number - AHEAD - 1, -1):
            if number in self._waiting:
                self._fetch(self._waiting[number])
        del self._waiting[stashed.number]
        assert stashed.fetched is not None and stashed.ready is not None
        torch.cuda.current_stream(stashed.device).wait_event(stashed.ready)
        return stashed.fetched

    def _fetch(self, stashed: Stashed) -> None:
        if stashed.fetched is not None:
            return
        assert self._stream is not None
        stashed.fetched = torch.empty_like(stashed.like, device=stashed.device)
        # The new memory may still be in use by what was launched before.
        self._stream.wait_stream(torch.cuda.current_stream(stashed.device))
        pieces = stashed.fetched.view(-1).split([len(piece) for piece in stashed.on_host])
        with torch.cuda.stream(self._stream):
            for piece, on_host in zip(pieces, stashed.on_host, strict=True):
                piece.copy_(on_host, non_blocking=True)
            stashed.ready = self._stream.record_event()

    @contextmanager
    def saves(self) -> Iterator[None]:
        """In this block, what autograd saves for backward is put away, parameters excepted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self.take):
            yield

    def _pack(self, tensor: Tensor) -> Stashed | Tensor:
        # Weights are on the device anyway; those of a sharded layer are gathered again in backward.
        is_weight = any(isinstance(t, torch.nn.Parameter) for t in (tensor, tensor._base))
        return tensor if is_weight else self.put(tensor.detach())
