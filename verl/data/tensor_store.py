"""Tensors on a local disk under content keys: bounded, shared by processes, safe to kill.

One safetensors file a key, written under a temporary name and renamed, so that a reader never
sees half a file. Locks are `flock` on files: the kernel drops them when a process dies, so nothing
has to be cleaned up after a crash. For node-local file systems.
"""

import fcntl
import json
import logging
import os
import re
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{8,128}")
_SUFFIX = ".safetensors"
_STALE_AFTER_S = 3600.0
_CHECKSUM = "crc32"


@dataclass(frozen=True)
class Entry:
    """What is stored under one key; tensors that come from a file are mapped, not read."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass
class StoreCounts:
    """What a store did in this process so far."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    evicted: int = 0
    not_stored: int = 0


class TensorStore:
    """Files under `root`, at most `limit_bytes` of them; the least recently used go first.

    Several processes and threads may use one folder, each through its own or a shared object.
    """

    def __init__(self, root: str | os.PathLike[str], limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes={limit_bytes} is negative; 0 stores nothing.")
        self.root = Path(root)
        self.limit_bytes = limit_bytes
        self.counts = StoreCounts()
        self._checked: dict[str, tuple[int, int, int]] = {}
        self._guard = threading.Lock()
        # Closed to other users: whoever can write here decides what the model sees.
        for folder in (self.root, self._locks, self._holds):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path_of(self, key: str) -> Path:
        """The file of a key, whether or not it exists."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key!r} is not a lower-case hexadecimal digest.")
        return self.root / f"{key}{_SUFFIX}"

    def get(self, key: str) -> Entry | None:
        """The entry of a key, None when there is none. A damaged file is named and removed."""
        path = self.path_of(key)
        try:
            entry = _read(path)
            damage = self._damage(key, path, entry)
        except FileNotFoundError:
            entry, damage = None, None
        except (SafetensorError, OSError, ValueError) as error:
            entry, damage = None, str(error)
        if damage is not None:
            logger.error("%s is damaged (%s): removed, to be made again", path, damage)
            path.unlink(missing_ok=True)
            self._count("damaged")
            entry = None
        if entry is not None:
            _touch(path)
            self._count("hits")
        return entry

    def get_or_make(self, key: str, make: Callable[[], Entry]) -> Entry:
        """The entry of a key; calls `make` and stores its result when there is none.

        Of several processes and threads that miss the same key, one makes it and the others
        wait for it. What `make` raises passes through, and the next one tries.
        """
        entry = self.get(key)
        if entry is not None:
            return entry
        # A fixed number of lock files: one a key would pile up, and removing one is a race.
        with self._exclusive(self._locks / f"{key[:2]}.lock"):
            entry = self.get(key)
            if entry is None:
                self._count("misses")
                entry = make()
                self.put(key, entry)
        return entry

    def put(self, key: str, entry: Entry) -> bool:
        """Store an entry; False, with a log line, when it does not fit or the disk refuses it."""
        path, temporary = self.path_of(key), self.root / f".tmp-{key}-{uuid.uuid4().hex}"
        whole = {name: tensor.contiguous() for name, tensor in entry.tensors.items()}
        try:
            save_file(whole, temporary, {**entry.metadata, _CHECKSUM: _checksum(whole)})
            with self._exclusive(self.root / ".evict.lock"):
                fits = self._make_room(temporary.stat().st_size, path)
                if fits:
                    os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            logger.warning("%s could not be stored: %s", path, error)
            fits = False
        finally:
            temporary.unlink(missing_ok=True)
        if not fits:
            self._count("not_stored")
            logger.debug("%s does not fit into %d bytes", path, self.limit_bytes)
        return fits

    @contextmanager
    def hold(self, keys: Iterable[str]) -> Iterator[None]:
        """While inside, no process evicts any of `keys`, stored already or not.

        A disk that refuses even this leaves them unprotected, with a log line.
        """
        path = self._holds / f"{os.getpid()}-{uuid.uuid4().hex}.json"
        listed = json.dumps(sorted(set(keys))).encode()
        descriptor = None
        try:
            with self._exclusive(self.root / ".evict.lock"):
                descriptor = _write_locked(path, listed)
        except OSError as error:
            logger.warning("entries in use may be evicted from %s: %s", self.root, error)
        try:
            yield
        finally:
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)

    def size_bytes(self) -> int:
        """Bytes of all stored entries."""
        return sum(size for _, size, _ in self._entries())

    @property
    def _locks(self) -> Path:
        return self.root / ".locks"

    @property
    def _holds(self) -> Path:
        return self.root / ".holds"

    def _count(self, name: str) -> None:
        with self._guard:
            setattr(self.counts, name, getattr(self.counts, name) + 1)

    def _damage(self, key: str, path: Path, entry: Entry) -> str | None:
        """Compare the checksum, once for each version of a file that this process sees."""
        info = path.stat()
        version = (info.st_ino, info.st_mtime_ns, info.st_size)
        if self._checked.get(key) == version:
            return None
        if _checksum(entry.tensors) != entry.metadata.get(_CHECKSUM):
            return "its checksum differs"
        self._checked[key] = version
        return None

    @contextmanager
    def _exclusive(self, path: Path) -> Iterator[None]:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(last use in ns, bytes, path) of all entries, least recently used first."""
        found = []
        for path in self.root.glob(f"*{_SUFFIX}"):
            try:
                info = path.stat()
            except FileNotFoundError:
                continue
            found.append((max(info.st_atime_ns, info.st_mtime_ns), info.st_size, path))
        return sorted(found)

    def _make_room(self, n_bytes: int, replaced: Path) -> bool:
        """Evict until `n_bytes` fit, sparing what is held. The caller has the eviction lock."""
        self._remove_stale()
        entries = [entry for entry in self._entries() if entry[2] != replaced]
        total = sum(size for _, size, _ in entries)
        if n_bytes > self.limit_bytes:
            return False
        held = self._held_keys() if total + n_bytes > self.limit_bytes else set()
        for _, size, path in entries:
            if total + n_bytes <= self.limit_bytes:
                break
            if path.name.removesuffix(_SUFFIX) not in held:
                path.unlink(missing_ok=True)
                self._count("evicted")
                total -= size
        return total + n_bytes <= self.limit_bytes

    def _held_keys(self) -> set[str]:
        held: set[str] = set()
        for path in self._holds.iterdir():
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)  # Its process is gone.
            except BlockingIOError:
                # Through the descriptor: the holder may remove the file any time now.
                held.update(json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0)))
            finally:
                os.close(descriptor)
        return held

    def _remove_stale(self) -> None:
        """Remove temporary files that a killed process left behind."""
        for path in self.root.glob(".tmp-*"):
            try:
                if time.time() - path.stat().st_mtime > _STALE_AFTER_S:
                    path.unlink()
            except FileNotFoundError:
                continue


def _read(path: Path) -> Entry:
    # safetensors opens a file twice, and another process may evict it in between; by way of a
    # descriptor it finds the same bytes both times.
    with (
        open(path, "rb") as opened,
        safe_open(f"/proc/self/fd/{opened.fileno()}", framework="pt", device="cpu") as file,
    ):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Entry(tensors, dict(file.metadata() or {}))


def _write_locked(path: Path, content: bytes) -> int:
    """A new file that is locked as long as the descriptor is open; nothing stays on an error."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    return descriptor


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _touch(path: Path) -> None:
    """Mark as used now. File systems update access times lazily or not at all."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return  # Evicted by another process since it was mapped, which keeps the mapping valid.
