"""Encodes media once and keeps the embeddings, however many rollouts and passes use them.

Letters: M visual tokens of one piece of media, E hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from verl.data.embed_store import EmbedKey, Embeds, EmbedStore
from verl.data.media import MediaCache, MediaItem, pixels
from verl.data.preprocess import VisionSpec
from verl.models.adapter import Adapter
from verl.models.policy import VisionInput
from verl.utils.exits import UserError
from verl.workers.encode_plan import Slice, micro_batches
from verl.workers.parallel_encode import ParallelEncoder

PATCHES_PER_CALL = 65_536


class VisionEngine(Protocol):
    """Whoever holds a vision tower."""

    adapter: Adapter
    device: torch.device
    tower_is_frozen: bool

    def encode(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Visual features of several pieces of media, concatenated, (M, E)."""
        ...


class WholeModel:
    """An unsharded model's vision tower, as `MediaEncoder` wants it."""

    tower_is_frozen = True

    def __init__(self, hf: Any, adapter: Adapter, device: torch.device) -> None:
        self._hf = hf
        self.adapter = adapter
        self.device = device

    @torch.no_grad()
    def encode(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        dtype = self._hf.dtype
        return self.adapter.encode(self._hf, pixels.to(self.device, dtype), grids)


@dataclass(frozen=True, kw_only=True)
class StoredFeatures:
    """A store, and what names a frozen tower's features in it."""

    store: EmbedStore
    family: str
    """`config.model_type`."""
    weights: str
    """Name of the tower's weights and projector."""
    dtype: torch.dtype
    """What the tower computes in, so that what is read equals what was made bit for bit."""
    num_chunk_seq: int = -1
    """Parts in which ranks gather a piece of media; -1: by free memory."""

    def key(self, item: MediaItem, spec: VisionSpec) -> EmbedKey:
        return EmbedKey(
            media=item.ref.key, family=self.family, weights=self.weights, dtype=self.dtype,
            pixels=spec,
        )  # fmt: skip


class MediaEncoder:
    """Turns media into visual features with an engine's tower.

    With `stored` and a frozen tower, features are made once for all processes, passes and runs
    that share the store, and read from it, mapped; `prepare` lets all ranks make them together.
    Without `stored`, with a frozen tower, features are kept in this process's memory up to
    `limit_bytes` (least recently used first out), and media that stay are encoded once. A trained
    tower changes every step, so its features are never kept, and its calls are collectives that
    all ranks make equally often. What a call returns lives beside the bound,
    until the caller drops it.
    With `blank`, every frame is the mean colour: what a model answers without seeing.
    """

    def __init__(
        self,
        engine: VisionEngine,
        cache: MediaCache,
        limit_bytes: int,
        *,
        blank: bool = False,
        stored: StoredFeatures | None = None,
    ) -> None:
        # A blind encoder's features would be found under the name of what the video shows.
        self._stored = stored if engine.tower_is_frozen and not blank else None
        self._blank = blank
        self._engine = engine
        self._cache = cache
        self._limit = limit_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._kept_bytes = 0
        self.encoded = 0
        """Pieces of media that went through the tower so far."""

    def features(self, items: Sequence[MediaItem]) -> Tensor | None:
        """Features of all items in order, concatenated (M, E) on the host; None without items."""
        return self.features_each([items])[0]

    def features_each(self, rows: Sequence[Sequence[MediaItem]]) -> list[Tensor | None]:
        """Features of each row's items, with as few calls of the tower as the budget allows."""
        unique = {item.ref.key: item for items in rows for item in items}
        if self._stored is not None:
            found = self._from_store(self._stored, unique)
            return [torch.cat([found[i.ref.key] for i in r]) if r else None for r in rows]
        found = {key: self._kept[key] for key in unique if key in self._kept}
        for chunk in self._chunks([item for key, item in unique.items() if key not in found]):
            found |= self._encode(chunk)
        if self._engine.tower_is_frozen:
            for key in unique:
                self._keep(key, found[key])
        return [torch.cat([found[i.ref.key] for i in items]) if items else None for items in rows]

    def prepare(self, items: Sequence[MediaItem]) -> int:
        """Makes what the store lacks of all ranks' items, all ranks together; how many were made.

        A collective where there is a store and a process group: every rank calls it, also with no
        items. Otherwise nothing happens. What the store has no room for is made when it is used.
        Raises UserError on all ranks when one of them cannot encode its part.
        """
        stored = self._stored
        if stored is None or not dist.is_initialized() or dist.get_world_size() == 1:
            return 0

        def is_stored(item: MediaItem) -> bool:
            return not stored.store.missing([stored.key(item, self._spec)])

        def write(item: MediaItem, features_ME: Tensor) -> bool:
            return stored.store.put(stored.key(item, self._spec), Embeds.of(item, features_ME))

        parallel = ParallelEncoder(
            self._encode_slices, write,
            device=self._engine.device, merge_size=self._spec.merge_size,
            patches_per_call=PATCHES_PER_CALL, num_chunk_seq=stored.num_chunk_seq,
        )  # fmt: skip
        n_made = parallel.run(items, is_stored)
        self.encoded += n_made * (dist.get_rank() == 0)  # Ranks are added up.
        return n_made

    def turns(self, n_calls: int) -> int:
        """How often this rank must call where it has `n_calls` of its own to make.

        With a frozen tower, just so often; a trained one's calls are collectives, so the most of
        any rank, and so is this one. Surplus calls are made with no rows.
        """
        if self._engine.tower_is_frozen:
            return n_calls
        most = torch.tensor(n_calls, device=self._engine.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def vision_input(self, items: Sequence[MediaItem]) -> VisionInput:
        """Pixels for a forward pass that trains the tower; a dummy grid where there are none."""
        if not items:
            merge = self._spec.merge_size
            nothing = torch.zeros(merge**2, self._patch_width, device=self._engine.device)
            return VisionInput(nothing, [(1, merge, merge)], is_dummy=True)
        values, grids = self._pixels(items)
        return VisionInput(values.to(self._engine.device), grids)

    @property
    def _spec(self) -> VisionSpec:
        assert self._engine.adapter.vision is not None
        return self._engine.adapter.vision

    def _chunks(self, items: Sequence[MediaItem]) -> list[list[MediaItem]]:
        """Items by patch budget; equally many chunks on all ranks where calls are collective."""
        chunks: list[list[MediaItem]] = []
        used = 0
        for item in items:
            t, h, w = item.grid_thw
            if chunks and used + t * h * w <= PATCHES_PER_CALL:
                chunks[-1].append(item)
                used += t * h * w
            else:
                chunks.append([item])
                used = t * h * w
        return chunks + [[]] * (self.turns(len(chunks)) - len(chunks))

    def _encode(self, items: Sequence[MediaItem]) -> dict[str, Tensor]:
        vision = self.vision_input(items)
        features_ME = self._engine.encode(vision.pixels, vision.grids).cpu()
        if vision.is_dummy:
            return {}
        self.encoded += len(items)
        sizes = [item.n_tokens for item in items]
        keys = [item.ref.key for item in items]
        # Each slice owns its memory: evicting one must free it.
        return {k: f.clone() for k, f in zip(keys, features_ME.split(sizes), strict=True)}

    def _from_store(self, stored: StoredFeatures, items: dict[str, MediaItem]) -> dict[str, Tensor]:
        """Features by media key, mapped; made and stored here where no process did so before."""
        keys = {stored.key(item, self._spec): item for item in items.values()}

        def make(absent: list[EmbedKey]) -> Iterator[Embeds]:
            for chunk in self._chunks([keys[key] for key in absent]):
                slices = [Slice(i, 0, item.grid_thw[0]) for i, item in enumerate(chunk)]
                groups = micro_batches(slices, [i.grid_thw for i in chunk], PATCHES_PER_CALL)
                made_ME = torch.cat([self._encode_slices(chunk, group).cpu() for group in groups])
                self.encoded += len(chunk)
                parts = made_ME.split([item.n_tokens for item in chunk])
                yield from map(Embeds.of, chunk, parts)

        with stored.store.hold(keys):
            embeds = stored.store.get_or_make_all(list(keys), make)
            return {e.ref.key: f.features for e, f in zip(keys.values(), embeds, strict=True)}

    def _encode_slices(self, items: Sequence[MediaItem], slices: Sequence[Slice]) -> Tensor:
        """Features of temporal steps of some items, concatenated, (M, E)."""
        patches = [self._patches(items[s.item], (s.start, s.stop)) for s in slices]
        grids = [(s.stop - s.start, *items[s.item].grid_thw[1:]) for s in slices]
        return self._engine.encode(torch.cat(patches).to(self._engine.device), grids)

    def _pixels(self, items: Sequence[MediaItem]) -> tuple[Tensor, list[tuple[int, int, int]]]:
        values = [self._patches(item) for item in items]
        return torch.cat(values), [item.grid_thw for item in items]

    def _patches(self, item: MediaItem, steps: tuple[int, int] | None = None) -> Tensor:
        """Rows for the tower of an item, or of its temporal steps from one to another."""
        t, h, w = item.grid_thw
        start, stop = steps or (0, t)
        if self._blank:
            return torch.zeros((stop - start) * h * w, self._patch_width)
        frames = self._cache.get(item.ref)
        size = self._spec.temporal_patch_size
        # A last, odd frame is in the last step alone: it is doubled there as in the whole.
        n_steps = -(-len(frames.frames_u8) // size)
        shown = replace(frames, frames_u8=frames.frames_u8[start * size : stop * size])
        patches, grid = pixels(shown, self._spec)
        if (n_steps, *grid[1:]) != item.grid_thw:
            raise UserError(
                f"{item.ref.path}: decoded to grid {(n_steps, *grid[1:])}, expected "
                f"{item.grid_thw}: the file has changed since the run started; restore it, or "
                "start again"
            )
        return patches

    @property
    def _patch_width(self) -> int:
        return 3 * self._spec.temporal_patch_size * self._spec.patch_size**2

    def _keep(self, key: str, value: Tensor) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        size = value.numel() * value.element_size()
        if size > self._limit:
            return
        while self._kept and self._kept_bytes + size > self._limit:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= old.numel() * old.element_size()
        self._kept[key] = value
        self._kept_bytes += size
