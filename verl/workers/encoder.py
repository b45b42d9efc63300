"""Encodes media once and keeps the embeddings, however many rollouts and passes use them.

Letters: M visual tokens of one piece of media, E hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from verl.data.embed_store import EmbedKey, Embeds, EmbedStore
from verl.data.media import Frames, MediaCache, MediaItem, MediaKind, pixels
from verl.data.preprocess import VisionSpec
from verl.models.adapter import Adapter
from verl.models.policy import VisionInput
from verl.utils.exits import UserError
from verl.utils.torch_functional import to_device
from verl.workers.batches import most_of_ranks
from verl.workers.encode_plan import Slice, micro_batches, rounds
from verl.workers.parallel_encode import ParallelEncoder

BLOCK_PATCHES = 4096
"""The tower is called for whole blocks: about so many patches of one piece of media."""
PATCHES_PER_CALL = 65_536
"""Most patches of several blocks in one call on a GPU."""


class VisionEngine(Protocol):
    """Whoever holds a vision tower."""

    adapter: Adapter
    device: torch.device
    tower_is_frozen: bool
    has_tower: bool
    """False where the tower was not loaded, since all features are stored."""

    def encode(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Visual features of several pieces of media, concatenated, (M, E)."""
        ...


class WholeModel:
    """An unsharded model's vision tower, as `MediaEncoder` wants it."""

    tower_is_frozen = True

    def __init__(
        self, hf: Any, adapter: Adapter, device: torch.device, *, has_tower: bool = True
    ) -> None:
        self._hf = hf
        self.adapter = adapter
        self.device = device
        self.has_tower = has_tower

    @torch.no_grad()
    def encode(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        return self.adapter.encode(self._hf, pixels.to(self.device, self._hf.dtype), grids)


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
    pixels: VisionSpec
    """How the family makes pixels of frames."""
    num_chunk_seq: int = -1
    """Parts in which ranks gather a piece of media; -1: by free memory."""

    def key(self, item: MediaItem, *, blank: bool = False) -> EmbedKey:
        """Name of the features of a piece of media; blank frames are the same for all of a size."""
        media = "blank {} {} {}".format(*item.grid_thw) if blank else item.ref.key
        return EmbedKey(
            media=media, family=self.family, weights=self.weights, dtype=self.dtype,
            pixels=self.pixels,
        )  # fmt: skip

    def has(self, item: MediaItem) -> bool:
        """Whether the features are there, so that nobody needs the frames."""
        return not self.store.missing([self.key(item)])

    def is_sound(self, item: MediaItem) -> bool:
        """`has`, and every byte of them is what was written; compared once a process."""
        return self.store.get(self.key(item)) is not None


class MediaEncoder:
    """Turns media into visual features with an engine's tower.

    With `stored`, which wants a frozen tower, features are made once for all processes, passes and
    runs that share the store, and read from it, mapped; `prepare` lets all ranks make them
    together. Without, they are made at every call: a trained tower changes every step, and its
    calls are collectives that all ranks make equally often.
    With `blank`, every frame is the mean colour: what a model answers without seeing.
    """

    def __init__(
        self,
        engine: VisionEngine,
        cache: MediaCache,
        stored: StoredFeatures | None = None,
        *,
        blank: bool = False,
    ) -> None:
        """Raises ValueError for `stored` with a trained tower, whose features would be stale."""
        if stored is not None and not engine.tower_is_frozen:
            raise ValueError("features of a tower that is trained are not stored")
        self._stored = stored
        self._blank = blank
        self._engine = engine
        self._cache = cache
        self._held = ExitStack()
        self._refused: set[str] = set()
        """Media keys that the store had no room for: made where they are used from then on."""
        self.encoded: Counter[MediaKind] = Counter()
        """Pieces of media that went through the tower so far, blank ones left out: once each where
        features are stored, at every pass where the tower is trained."""

    def name_of(self, item: MediaItem) -> str:
        """Of a piece of media's features: equal names, equal features, while weights stay."""
        if self._stored is not None:
            return self._stored.key(item, blank=self._blank).digest()
        return f"blank {item.grid_thw}" if self._blank else item.ref.key

    def features(self, items: Sequence[MediaItem]) -> Tensor | None:
        """Features of all items in order, concatenated (M, E) on the host; None without items."""
        return self.features_each([items])[0]

    def features_each(self, rows: Sequence[Sequence[MediaItem]]) -> list[Tensor | None]:
        """Features of each row's items, those of a row with one piece mapped and not copied.

        Raises UserError for media that are not stored where no tower was loaded.
        """
        unique = {item.ref.key: item for items in rows for item in items}
        if self._stored is not None:
            found = self._from_store(self._stored, unique)
        elif self._engine.tower_is_frozen:
            items = list(unique.values())
            found = dict(zip(unique, self._made(items), strict=True))
        else:
            found = self._from_trained_tower(list(unique.values()))
        return [_joined([found[item.ref.key] for item in items]) for items in rows]

    def prepare(self, items: Sequence[MediaItem]) -> int:
        """Makes what the store lacks of all ranks' items, all ranks together; how many were made.

        A collective where there is a store and a process group: every rank calls it, also with no
        items. Until the next call no process of this machine evicts the features of `items`.
        Without a store nothing happens; what it has no room for is made when it is used.
        Raises UserError on all ranks when one of them cannot encode its part.
        """
        stored = self._stored
        if stored is None:
            return 0
        with ExitStack() as held:
            held.enter_context(stored.store.hold(self._keys(stored, items)))
            self._held.close()
            self._held = held.pop_all()
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if self._blank or alone or not self._engine.has_tower or not stored.store.limit_bytes:
            return 0

        def write(item: MediaItem, features_ME: Tensor) -> bool:
            return stored.store.put(stored.key(item), Embeds.of(item, features_ME))

        parallel = ParallelEncoder(
            self._encode_slices, write,
            device=self._engine.device, merge_size=stored.pixels.merge_size,
            block_patches=BLOCK_PATCHES, num_chunk_seq=stored.num_chunk_seq,
        )  # fmt: skip
        made, refused = parallel.run(items, lambda i: i.ref.key in self._refused or stored.has(i))
        self._refused.update(item.ref.key for item in refused)
        if dist.get_rank() == 0:  # Ranks are added up.
            self.encoded.update(item.ref.kind for item in made)
        return len(made)

    def turns(self, n_calls: int) -> int:
        """How often this rank must call where it has `n_calls` of its own to make.

        With a frozen tower, just so often; a trained one's calls are collectives, so the most of
        any rank, and so is this one. Surplus calls are made with no rows.
        """
        if self._engine.tower_is_frozen:
            return n_calls
        return most_of_ranks(n_calls, self._engine.device)

    def vision_input(self, items: Sequence[MediaItem]) -> VisionInput:
        """Pixels for a forward pass that trains the tower; a dummy grid where there are none."""
        if not items:
            merge = self._spec.merge_size
            nothing = torch.zeros(merge**2, self._patch_width, device=self._engine.device)
            return VisionInput(nothing, [(1, merge, merge)], is_dummy=True)
        self.encoded.update(item.ref.kind for item in items)
        patches = [self._patches(i, self._frames(i), (0, i.grid_thw[0])) for i in items]
        return VisionInput(torch.cat(patches), [item.grid_thw for item in items])

    @property
    def _spec(self) -> VisionSpec:
        assert self._engine.adapter.vision is not None
        return self._engine.adapter.vision

    def _keys(self, stored: StoredFeatures, items: Iterable[MediaItem]) -> list[EmbedKey]:
        return [stored.key(item, blank=self._blank) for item in items]

    def _from_store(self, stored: StoredFeatures, items: dict[str, MediaItem]) -> dict[str, Tensor]:
        """Features by media key, mapped; made and stored here where no process did so before."""
        keys = self._keys(stored, items.values())
        by_key = dict(zip(keys, items.values(), strict=True))

        def make(absent: list[EmbedKey]) -> Iterator[Embeds]:
            wanted = [by_key[key] for key in absent]
            if not self._engine.has_tower:
                raise _not_stored(wanted[0], stored)
            yield from map(Embeds.of, wanted, self._made(wanted))

        embeds = stored.store.get_or_make_all(keys, make)
        return {media: e.features for media, e in zip(items, embeds, strict=True)}

    def _made(self, items: Sequence[MediaItem]) -> Iterator[Tensor]:
        """Features of each item, (M, E) on the host, made here."""
        parts: list[Tensor] = []
        for part, features_ME in self._encoded(items, _whole(items)):
            parts.append(features_ME)
            if part.stop == items[part.item].grid_thw[0]:
                if not self._blank:
                    self.encoded[items[part.item].ref.kind] += 1
                # Each piece owns its memory, and nothing of it stays here while it is stored.
                whole_ME, parts = torch.cat(parts) if len(parts) > 1 else parts[0].clone(), []
                yield whole_ME

    def _encode_slices(self, items: Sequence[MediaItem], slices: Sequence[Slice]) -> Tensor:
        """Features of temporal steps of some items, concatenated, (M, E) on the device."""
        parts = [features_ME for _, features_ME in self._called(items, slices)]
        return torch.cat(parts) if parts else torch.empty(0, 0, device=self._engine.device)

    def _encoded(
        self, items: Sequence[MediaItem], slices: Sequence[Slice]
    ) -> Iterator[tuple[Slice, Tensor]]:
        """Blocks of some slices with their features on the host, in order.

        A GPU is one call ahead: while it works, the next frames are read and copied to it.
        """
        grids = [item.grid_thw for item in items]
        before: tuple[list[Slice], Tensor] | None = None
        for call in self._called(items, slices):
            if before is not None:
                yield from self._split(grids, *before)
            before = call
        if before is not None:
            yield from self._split(grids, *before)

    def _called(
        self, items: Sequence[MediaItem], slices: Sequence[Slice]
    ) -> Iterator[tuple[list[Slice], Tensor]]:
        """Calls of the tower: the blocks of each, and their features on the device.

        On the CPU every block is a call of its own, so that its features are the same bit for bit
        whatever else is encoded with it; matrix products of other sizes round in another way.
        """
        grids = [item.grid_thw for item in items]
        budget = _patches_at_once(self._engine.device)
        opened, frames = -1, None
        for group in micro_batches(slices, grids, BLOCK_PATCHES, budget):
            patches: list[Tensor] = []
            for part in group:
                if part.item != opened:
                    opened, frames = part.item, self._frames(items[part.item])
                patches.append(self._patches(items[part.item], frames, (part.start, part.stop)))
            shapes = [(s.stop - s.start, *grids[s.item][1:]) for s in group]
            yield group, self._engine.encode(torch.cat(patches), shapes)

    def _split(
        self, grids: Sequence[tuple[int, int, int]], group: list[Slice], features_ME: Tensor
    ) -> Iterator[tuple[Slice, Tensor]]:
        merged = self._spec.merge_size**2
        sizes = [(s.stop - s.start) * grids[s.item][1] * grids[s.item][2] // merged for s in group]
        yield from zip(group, features_ME.cpu().split(sizes), strict=True)

    def _from_trained_tower(self, items: Sequence[MediaItem]) -> dict[str, Tensor]:
        """Features by media key, in calls of whole pieces, equally many on all ranks."""
        calls = rounds([item.grid_thw for item in items], PATCHES_PER_CALL)
        found: dict[str, Tensor] = {}
        for turn in range(self.turns(len(calls))):
            call = [items[i] for i in calls[turn]] if turn < len(calls) else []
            vision = self.vision_input(call)
            features_ME = self._engine.encode(vision.pixels, vision.grids).cpu()
            if call:
                parts = features_ME.split([item.n_tokens for item in call])
                found |= zip([item.ref.key for item in call], parts, strict=True)
        return found

    def _frames(self, item: MediaItem) -> Frames | None:
        """Decoded frames, None for an encoder that is blind. Raises UserError for another grid."""
        if self._blank:
            return None
        frames = self._cache.get(item.ref)
        n, _, height, width = frames.frames_u8.shape
        size, patch = self._spec.temporal_patch_size, self._spec.patch_size
        grid = (-(-n // size), height // patch, width // patch)
        if grid != item.grid_thw:
            raise UserError(
                f"{item.ref.path}: decoded to grid {grid}, expected {item.grid_thw}: the file has "
                "changed since the run started; restore it, or start again"
            )
        return frames

    def _patches(self, item: MediaItem, frames: Frames | None, steps: tuple[int, int]) -> Tensor:
        """Rows for the tower of temporal steps of an item, on the device.

        Frames travel as bytes, a quarter of what their pixels take, and become pixels there.
        """
        _, h, w = item.grid_thw
        start, stop = steps
        device = self._engine.device
        if frames is None:
            return torch.zeros((stop - start) * h * w, self._patch_width, device=device)
        size = self._spec.temporal_patch_size
        # A last, odd frame is in the last step alone: it is doubled there as in the whole.
        shown = to_device(frames.frames_u8[start * size : stop * size], device)
        return pixels(replace(frames, frames_u8=shown), self._spec)[0]

    @property
    def _patch_width(self) -> int:
        return 3 * self._spec.temporal_patch_size * self._spec.patch_size**2


def _not_stored(item: MediaItem, stored: StoredFeatures) -> UserError:
    """A piece of media without features where no tower was loaded, on this machine at least."""
    return UserError(
        f"{item.ref.path}: cached_embeds_dir={stored.store.root} has no embeddings of grid "
        f"{item.grid_thw} in {stored.dtype} of this model's tower on this machine; make them with "
        "python3 -m verl.utils.cache_video_embeds_vila and the settings of this run, or leave "
        "cached_embeds_dir out"
    )


def _whole(items: Sequence[MediaItem]) -> list[Slice]:
    return [Slice(i, 0, item.grid_thw[0]) for i, item in enumerate(items)]


def _joined(features: list[Tensor]) -> Tensor | None:
    if len(features) == 1:
        return features[0]
    return torch.cat(features) if features else None


def _patches_at_once(device: torch.device) -> int:
    """Most patches of several blocks in a call; 0: every block is a call."""
    return PATCHES_PER_CALL if device.type == "cuda" else 0
