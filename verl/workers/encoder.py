"""Encodes media once and keeps the embeddings, however many rollouts and passes use them.

Letters: M visual tokens of one piece of media, E hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from verl.data.media import MediaCache, MediaItem

from verl.data.preprocess import VisionSpec, to_pixels
from verl.models.policy import VisionInput
from verl.workers.fsdp_engine import FSDPEngine

PATCHES_PER_CALL = 65_536


class MediaEncoder:
    """Turns media into visual features with an engine's tower.

    With a frozen tower, features are kept in host memory up to `limit_bytes` (least recently used
    first out) and each piece of media is encoded once. A trained tower changes every step, so its
    features are never kept, and its calls are collectives that all ranks make equally often.
    """

    def __init__(self, engine: FSDPEngine, cache: MediaCache, limit_bytes: int) -> None:
        self._engine = engine
        self._cache = cache
        self._limit = limit_bytes
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._kept_bytes = 0
        self.encoded = 0
        """Pieces of media that went through the tower so far."""

    def features(self, items: Sequence[MediaItem]) -> Tensor | None:
        """Features of all items in order, concatenated (M, E) on the host; None without items."""
        unique = {item.ref.key: item for item in items}
        missing = [item for key, item in unique.items() if key not in self._kept]
        fresh: dict[str, Tensor] = {}
        for chunk in self._chunks(missing):
            fresh |= self._encode(chunk)
        if not items:
            return None
        rows = [fresh[i.ref.key] if i.ref.key in fresh else self._kept[i.ref.key] for i in items]
        if self._engine.tower_is_frozen:
            for key, value in fresh.items():
                self._keep(key, value)
            for key in unique:
                if key in self._kept:
                    self._kept.move_to_end(key)
        return torch.cat(rows)

    def vision_input(self, items: Sequence[MediaItem]) -> VisionInput:
        """Pixels for a forward pass that trains the tower; a dummy grid where there are none."""
        if not items:
            spec = self._spec
            grid = (1, spec.merge_size, spec.merge_size)
            width = 3 * spec.temporal_patch_size * spec.patch_size**2
            pixels = torch.zeros(spec.merge_size**2, width, device=self._engine.device)
            return VisionInput(pixels, [grid], is_dummy=True)
        pixels, grids = self._pixels(items)
        return VisionInput(pixels.to(self._engine.device), grids)

    @property
    def _spec(self) -> VisionSpec:
        assert self._engine.adapter.vision is not None
        return self._engine.adapter.vision

    def _chunks(self, items: Sequence[MediaItem]) -> list[list[MediaItem]]:
        """Items by patch budget; the same number of chunks on all ranks where calls are collective."""
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
        if not self._engine.tower_is_frozen:
            most = torch.tensor(len(chunks), device=self._engine.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            chunks.extend([] for _ in range(int(most) - len(chunks)))
        return chunks

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

    def _pixels(self, items: Sequence[MediaItem]) -> tuple[Tensor, list[tuple[int, int, int]]]:
        pixels, grids = [], []
        for item in items:
            patches, grid = to_pixels(self._cache.get(item.ref), self._spec)
            if grid != item.grid_thw:
                raise ValueError(
                    f"{item.ref.path}: decoded to grid {grid}, expected {item.grid_thw}"
                )
            pixels.append(patches)
            grids.append(grid)
        return torch.cat(pixels), grids

    def _keep(self, key: str, value: Tensor) -> None:
        size = value.numel() * value.element_size()
        if size > self._limit:
            return
        while self._kept and self._kept_bytes + size > self._limit:
            _, old = self._kept.popitem(last=False)
            self._kept_bytes -= old.numel() * old.element_size()
        self._kept[key] = value
        self._kept_bytes += size
