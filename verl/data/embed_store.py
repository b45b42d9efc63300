"""Visual embeddings that are encoded once: on a local disk, by content, mapped, shared, bounded.

    python3 -m verl.data.embed_store ls|verify|prune DIR

One safetensors file a piece of media, `<key>.safetensors`; `by_name/` holds links with the names
of the videos, for people. Letters: M visual tokens, E width of a token (for a family with several
levels of features, all of them side by side).

When damage is noticed: the header, with grid and times, is checked at every `get`. Embeddings have
a CRC-32 for every 4 MiB, and a block is compared when its rows are first asked for, once for each
version of a file that a process sees; so reading a slice reads that slice and at most 4 MiB at
either end. What rots on a disk after a process read it is found by the next process or `verify`.
A file of a store must never be written in place: whoever has it mapped would see that.
"""

# torch is imported where tensors are made: the commands above do without and start at once.
from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from verl.data.embed_file import (
    FORMAT_VERSION,
    DamagedEmbeds,
    EmbedFile,
    EmbedRecord,
    encode_header,
    write_embeds,
)
from verl.data.file_store import FileStore, StoreCounts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from verl.data.media import MediaItem
    from verl.data.preprocess import VisionSpec

__all__ = ["BY_NAME", "DamagedEmbeds", "EmbedKey", "EmbedStore", "Embeds", "StoreCounts"]

logger = logging.getLogger(__name__)

PREPROCESS_VERSION = 1
"""Part of every key: raise it when the same frames would give other pixels for a tower."""
BY_NAME = "by_name"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_NAMES = {f"torch.{name}": short for short, name in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class EmbedKey:
    """All that decides the numbers of an embedding."""

    media: str
    """`MediaRef.key`: content of the file, frames, size, decoder."""
    family: str
    """`config.model_type`."""
    weights: str
    """`verl.models.fingerprint`: vision tower and projector."""
    dtype: torch.dtype
    """What the tower computes in, and what is stored: a bf16 tower never serves a float32 one."""
    pixels: VisionSpec | None = None
    """How the family makes pixels of frames: mean and deviation are not in `media`."""

    def digest(self) -> str:
        """The key as text, a name for a file."""
        described = {
            "version": [FORMAT_VERSION, PREPROCESS_VERSION],
            "media": self.media,
            "family": self.family,
            "weights": self.weights,
            "dtype": str(self.dtype),
            "pixels": None if self.pixels is None else asdict(self.pixels),
        }
        text = json.dumps(described, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Embeds:
    """Embeddings of one piece of media with what belongs to them; mapped when they were stored."""

    def __init__(
        self,
        features: Tensor,
        *,
        grid_thw: tuple[int, int, int],
        seconds_per_grid: float,
        frame_times: Sequence[float],
        path: str,
        record: EmbedRecord | None = None,
        check: Callable[[int, int], None] | None = None,
    ) -> None:
        if features.ndim != 2 or not features.numel():
            raise ValueError(f"{path}: features have the shape {tuple(features.shape)}, not (M, E)")
        self._features = features
        self._check = check
        self.grid_thw = grid_thw
        self.seconds_per_grid = seconds_per_grid
        self.frame_times = tuple(frame_times)
        self.path = path
        self.record = record
        """Provenance; None for what was never stored."""

    @classmethod
    def of(cls, item: MediaItem, features: Tensor) -> Embeds:
        """Fresh features of a piece of media, (M, E). Raises ValueError for another M."""
        if len(features) != item.n_tokens:
            raise ValueError(
                f"{item.ref.path}: {len(features)} rows of features for {item.n_tokens} tokens"
            )
        return cls(
            features,
            grid_thw=item.grid_thw,
            seconds_per_grid=item.seconds_per_grid,
            frame_times=item.frame_times,
            path=item.ref.path,
        )

    @property
    def n_tokens(self) -> int:
        """M."""
        return len(self._features)

    @property
    def features(self) -> Tensor:
        """All rows, (M, E). Raises DamagedEmbeds."""
        return self.slice(0, self.n_tokens)

    def slice(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`; reads these only. Raises DamagedEmbeds, IndexError."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"rows {start}:{stop} of {self.path}, which has {self.n_tokens}")
        if self._check is not None:
            self._check(start, stop)
        return self._features[start:stop]


class EmbedStore:
    """Embeddings under `root`, at most `limit_bytes` of them; the least recently used go first.

    Processes and threads of one node share a folder. What a running step needs is kept by `hold`;
    what is evicted nevertheless stays readable for whoever has it. The file system must be local.
    """

    def __init__(self, root: str | os.PathLike[str], limit_bytes: int) -> None:
        """Raises ValueError for a negative limit; 0 stores nothing."""
        self._files = FileStore(root, limit_bytes)
        self._checked: dict[str, tuple[tuple[int, int, int], set[int]]] = {}

    @property
    def root(self) -> Path:
        return self._files.root

    @property
    def limit_bytes(self) -> int:
        return self._files.limit_bytes

    @property
    def counts(self) -> StoreCounts:
        """Hits, misses (what was made), damaged and evicted files of this object."""
        return self._files.counts

    def path_of(self, key: EmbedKey) -> Path:
        """The file of a key, whether or not it exists."""
        return self._files.path_of(key.digest())

    def get(self, key: EmbedKey, rows: tuple[int, int] | None = None) -> Embeds | None:
        """The embeddings of a key, None when there are none.

        Header and `rows` (start, stop; None: all) are checked; what is damaged is named, removed
        and counts as absent. Rows outside of `rows` are checked when they are sliced.
        """
        digest = key.digest()
        file = self._opened(self._files.path_of(digest))
        if file is None:
            return None
        embeds = self._embeds(digest, file)
        try:
            embeds.slice(*((0, embeds.n_tokens) if rows is None else rows))
        except DamagedEmbeds:
            return None
        self._files.touch(file.path)
        self._files.count("hits")
        return embeds

    def missing(self, keys: Iterable[EmbedKey]) -> list[EmbedKey]:
        """Those of `keys` that are not stored, each once; for ranks that share out the work."""
        return [key for key in dict.fromkeys(keys) if not self.path_of(key).exists()]

    def put(self, key: EmbedKey, embeds: Embeds) -> bool:
        """Store embeddings; False, with a log line, when they do not fit or the disk refuses.

        Raises ValueError for another dtype than the key's: rounding would be found by nobody.
        """
        import torch

        features = embeds.features.detach().cpu().contiguous()
        if features.dtype != key.dtype or str(key.dtype) not in _NAMES:
            raise ValueError(
                f"{embeds.path}: the key says {key.dtype}, the features are {features.dtype}; both "
                f"must be what the tower computes in, one of {sorted(_NAMES)}"
            )
        data = features.view(torch.uint8).numpy().data.cast("B")
        record = _record(key, embeds, features.shape[1])
        header = encode_header(record, data)
        digest, n_evicted = record.key, self.counts.evicted
        stored = self._files.commit(
            digest, len(header) + data.nbytes, lambda file: write_embeds(file, header, data)
        )
        if stored:
            self._link(record)
        if self.counts.evicted > n_evicted:
            remove_dead_links(self.root)
        return stored

    def get_or_make(self, key: EmbedKey, make: Callable[[], Embeds]) -> Embeds:
        """The embeddings of a key; calls `make` and stores its result when there are none.

        Of several processes and threads that miss the same key, one makes it and the others wait.
        What `make` raises passes through, and the next one tries.
        """
        return self.get_or_make_all([key], lambda _: [make()])[0]

    def get_or_make_all(
        self, keys: Sequence[EmbedKey], make: Callable[[list[EmbedKey]], Iterable[Embeds]]
    ) -> list[Embeds]:
        """`get_or_make` for a batch: `make` gives the embeddings of all that are missing, in order.

        A generator is best: each result is stored, and let go of, before the next is asked for.
        `make` must not wait for another process that asks this store for some of the same keys;
        ranks that encode together use `missing` on one rank, and `put`.
        """
        found = {key: self.get(key) for key in dict.fromkeys(keys)}
        if absent := [key for key, embeds in found.items() if embeds is None]:
            with self._files.making(key.digest() for key in absent) as release:
                found |= {key: self.get(key) for key in absent}
                absent = [key for key in absent if found[key] is None]
                for key, made in zip(absent, make(absent) if absent else (), strict=True):
                    self._files.count("misses")
                    found[key] = self._stored(key, made)
                    release(key.digest())
        return [embeds for key in keys if (embeds := found[key]) is not None]

    def hold(self, keys: Iterable[EmbedKey]) -> AbstractContextManager[None]:
        """While inside, no process evicts any of `keys`, stored already or not."""
        return self._files.hold(key.digest() for key in keys)

    def size_bytes(self) -> int:
        """Bytes of all stored entries."""
        return self._files.size_bytes()

    def _stored(self, key: EmbedKey, made: Embeds) -> Embeds:
        """What was made, mapped from its file now so that its memory is free; or itself."""
        file = self._opened(self.path_of(key)) if self.put(key, made) else None
        return made if file is None else self._embeds(key.digest(), file)

    def _embeds(self, digest: str, file: EmbedFile) -> Embeds:
        record = file.record

        def check(start: int, stop: int) -> None:
            version, done = self._checked.get(digest, (None, set[int]()))
            if version != file.version:
                done = set[int]()
                self._checked[digest] = (file.version, done)
            new = set(file.blocks_of(start, stop)) - done
            try:
                file.check(sorted(new))
            except DamagedEmbeds as damage:
                self._files.discard(file.path, file.version[0], damage.reason)
                raise
            done |= new

        return Embeds(
            _mapped(file),
            grid_thw=record.grid_thw,
            seconds_per_grid=record.seconds_per_grid,
            frame_times=record.frame_times,
            path=record.path,
            record=record,
            check=check,
        )

    def _opened(self, path: Path) -> EmbedFile | None:
        """A file with a good header; a bad one is removed."""
        try:
            return EmbedFile(path, _map_file)
        except FileNotFoundError:
            return None
        except DamagedEmbeds as damage:
            with suppress(FileNotFoundError):
                self._files.discard(path, path.stat().st_ino, damage.reason)
            return None

    def _link(self, record: EmbedRecord) -> None:
        """A name for people. Nothing is looked up by it, so that failing to make it costs nothing.

        The video's name comes from a data set: it is used as a file name, never as a path.
        """
        stem = re.sub(r"[^\w.+-]", "_", Path(record.path).stem)[:80].lstrip(".") or "media"
        name = f"{stem}.{len(record.frame_times)}f.{record.key[:12]}.safetensors"
        folder = self.root / BY_NAME
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(Path("..", f"{record.key}.safetensors"))
            temporary.replace(folder / name)
        except OSError as error:
            logger.debug("no link %s: %s", folder / name, error)


def remove_dead_links(root: Path) -> None:
    """Remove the names of entries that are gone."""
    for link in (root / BY_NAME).glob("*"):
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)


def _record(key: EmbedKey, embeds: Embeds, width: int) -> EmbedRecord:
    return EmbedRecord(
        key=key.digest(),
        media=key.media,
        family=key.family,
        weights=key.weights,
        dtype=_NAMES[str(key.dtype)],
        path=embeds.path,
        grid_thw=embeds.grid_thw,
        seconds_per_grid=embeds.seconds_per_grid,
        frame_times=embeds.frame_times,
        n_tokens=embeds.n_tokens,
        width=width,
        made_at=time.time(),
        made_by=_versions(),
    )


def _versions() -> str:
    found = []
    for name in ("long-rl", "torch", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def _map_file(file: BinaryIO, n_bytes: int) -> memoryview:
    """The whole file as memory that may be written to without reaching the file.

    torch's mapping keeps no descriptor open, unlike Python's before 3.13: a batch of hundreds of
    videos must not run into the limit of open files. By way of this file's descriptor torch opens
    the same bytes, even when another process has replaced the file.
    """
    import torch

    path = f"/proc/self/fd/{file.fileno()}"
    return torch.from_file(path, shared=False, size=n_bytes, dtype=torch.uint8).numpy().data


def _mapped(file: EmbedFile) -> Tensor:
    """The embeddings in the mapped file, (M, E); pages are read when they are touched."""
    import torch

    record = file.record
    return torch.frombuffer(
        file.map,
        dtype=getattr(torch, _DTYPES[record.dtype]),
        count=record.n_tokens * record.width,
        offset=file.offset,
    ).view(record.n_tokens, record.width)


if __name__ == "__main__":
    from verl.data.embed_store_cli import main

    sys.exit(main())
