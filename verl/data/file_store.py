"""Files under content keys on a local disk: bounded, shared by processes, safe to kill. No torch.

A file is written under a temporary name, flushed and renamed, so that a reader never sees half of
one and a power cut leaves either all of it or none. Locks belong to open files: the kernel drops
them when a process dies, so nothing has to be cleaned up after a crash. For node-local Linux file
systems.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from verl.utils.manifest import fsync

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_KEY = re.compile(r"[0-9a-f]{8,128}")
_PART = ".part-"


@dataclass
class StoreCounts:
    """What a store did in this process so far."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    evicted: int = 0
    not_stored: int = 0


@dataclass(frozen=True, order=True)
class StoredFile:
    """One file of a store; the one that sorts first was not used for the longest time."""

    last_use_ns: int
    n_bytes: int
    path: Path

    @property
    def key(self) -> str:
        """The key it is stored under."""
        return self.path.name.removesuffix(SUFFIX)


class FileStore:
    """Files under `root`, at most `limit_bytes` of them; the least recently used go first.

    Several processes and threads may use one folder, each through its own or a shared object.
    """

    def __init__(self, root: str | os.PathLike[str], limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes={limit_bytes} is negative; 0 stores nothing.")
        self.root = Path(root)
        self.limit_bytes = limit_bytes
        self.counts = StoreCounts()
        self._guard = threading.Lock()
        self._warned = False
        # Closed to other users: whoever can write here decides what the model sees.
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path_of(self, key: str) -> Path:
        """The file of a key, whether or not it exists."""
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key!r} is not a lower-case hexadecimal digest.")
        return self.root / f"{key}{SUFFIX}"

    def commit(self, key: str, n_bytes: int, write: Callable[[BinaryIO], object]) -> bool:
        """Store what `write` puts into a file, `n_bytes` of it; makes room first.

        False, with a log line, when it does not fit beside what is held or the disk refuses it.
        While it is written, the folder holds up to `n_bytes` more than the limit.
        """
        path, fits = self.path_of(key), False
        try:
            if n_bytes <= self.limit_bytes:
                with self._part(key) as (part, file):
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                    with self._evicting():
                        fits = self._make_room(os.fstat(file.fileno()).st_size, path)
                        if fits:
                            os.replace(part, path)
                fsync(self.root)  # makes the rename last through a power cut
            if not fits:
                logger.debug("%s does not fit into %d bytes", path, self.limit_bytes)
        except OSError as error:
            logger.warning("%s could not be stored: %s", path, error)
            fits = False
        if not fits:
            self.count("not_stored")
        return fits

    @contextmanager
    def making(self, keys: Iterable[str]) -> Iterator[Callable[[str], None]]:
        """Only one process or thread at a time is inside with the same key; others wait.

        Gives a function that lets go of one key early. Keys never collide, and those of one call
        are locked in one order, so that two calls cannot wait for each other. A thread that is
        inside must not ask for more keys. Where no lock can be had, as in a folder that may only
        be read, everyone is let in, with a log line.
        """
        try:
            descriptor = os.open(self.root / ".making.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            logger.warning("work may be done twice, without a lock in %s: %s", self.root, error)
            yield lambda key: None
            return
        try:
            for place in sorted({_place_of(key) for key in keys}):
                _lock_byte(descriptor, fcntl.F_WRLCK, place)
            yield lambda key: _lock_byte(descriptor, fcntl.F_UNLCK, _place_of(key))
        finally:
            # Not left to `close`: a forked child may have the same open file.
            _lock_byte(descriptor, fcntl.F_UNLCK, 0, 0)
            os.close(descriptor)

    @contextmanager
    def hold(self, keys: Iterable[str]) -> Iterator[None]:
        """While inside, no process evicts any of `keys`, stored already or not.

        A disk that refuses even this leaves them unprotected, with a log line.
        """
        path = self._holds / f"{os.getpid()}-{uuid.uuid4().hex}.json"
        listed = json.dumps(sorted(set(keys))).encode()
        descriptor = None
        try:
            self._holds.mkdir(mode=0o700, exist_ok=True)
            with self._evicting():
                descriptor = _write_locked(path, listed)
        except OSError as error:
            # A folder that may only be read is not one that anybody evicts from.
            level = logging.WARNING if os.access(self.root, os.W_OK) else logging.DEBUG
            level, self._warned = (logging.DEBUG if self._warned else level), True
            logger.log(level, "entries in use may be evicted from %s: %s", self.root, error)
        try:
            yield
        finally:
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)

    def touch(self, path: Path) -> None:
        """Mark as used now. File systems update access times lazily or not at all."""
        try:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except OSError:
            # Evicted by another process since it was mapped, which keeps the mapping valid; or
            # the folder may only be read.
            return

    def discard(self, path: Path, inode: int, reason: str) -> None:
        """Name a damaged file and remove it, unless a good one has taken its place by now."""
        logger.error("%s is damaged (%s): removed, to be made again", path, reason)
        self.count("damaged")
        try:
            with self._evicting():
                if path.exists() and path.stat().st_ino == inode:
                    path.unlink()
        except OSError as error:
            logger.error("%s cannot be removed: %s", path, error)

    def remove(self, choose: Callable[[list[StoredFile], int], Iterable[StoredFile]]) -> None:
        """Remove the files that `choose` picks, given all that are not held and the held bytes."""
        with self._evicting():
            self._remove_parts()
            held, files = self._held_keys(), stored_files(self.root)
            held_bytes = sum(file.n_bytes for file in files if file.key in held)
            for file in choose([file for file in files if file.key not in held], held_bytes):
                file.path.unlink(missing_ok=True)

    def size_bytes(self) -> int:
        """Bytes of all stored entries."""
        return sum(file.n_bytes for file in stored_files(self.root))

    def count(self, name: str) -> None:
        """One more of what `StoreCounts` calls `name`."""
        with self._guard:
            setattr(self.counts, name, getattr(self.counts, name) + 1)

    @property
    def _holds(self) -> Path:
        return self.root / ".holds"

    @contextmanager
    def _evicting(self) -> Iterator[None]:
        descriptor = os.open(self.root / ".evict.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    @contextmanager
    def _part(self, key: str) -> Iterator[tuple[Path, BinaryIO]]:
        """A temporary file that is locked while its writer lives, and is gone afterwards."""
        path = self.root / f"{_PART}{key}-{uuid.uuid4().hex}"
        try:
            with self._evicting():  # Nobody takes it for a dead writer's before it is locked.
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            with open(descriptor, "wb") as file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    def _make_room(self, n_bytes: int, replaced: Path) -> bool:
        """Evict until `n_bytes` fit, sparing what is held; nothing where that is not enough.

        The caller has the eviction lock.
        """
        self._remove_parts()
        files = [file for file in stored_files(self.root) if file.path != replaced]
        surplus = sum(file.n_bytes for file in files) + n_bytes - self.limit_bytes
        held = self._held_keys() if surplus > 0 else set()
        chosen = []
        for file in files:
            if surplus > 0 and file.key not in held:
                chosen.append(file)
                surplus -= file.n_bytes
        if surplus > 0:
            return False
        for file in chosen:
            file.path.unlink(missing_ok=True)
            self.count("evicted")
        return True

    def _held_keys(self) -> set[str]:
        held: set[str] = set()
        for path in self._holds.glob("*"):  # nothing where nobody ever held anything
            content = _of_a_living_owner(path)
            if content is not None:
                held.update(json.loads(content))
        return held

    def _remove_parts(self) -> None:
        """Remove temporary files whose writers were killed."""
        for path in self.root.glob(f"{_PART}*"):
            _of_a_living_owner(path, read=False)


def stored_files(root: Path) -> list[StoredFile]:
    """All entries of a store's folder, least recently used first."""
    found = []
    for path in root.glob(f"*{SUFFIX}"):
        try:
            info = path.stat()
        except FileNotFoundError:
            continue
        found.append(StoredFile(max(info.st_atime_ns, info.st_mtime_ns), info.st_size, path))
    return sorted(found)


def _of_a_living_owner(path: Path, *, read: bool = True) -> bytes | None:
    """Content of a file whose owner has it locked; removes it and gives None where it is dead."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return None
    except BlockingIOError:
        # Through the descriptor: the owner may remove the file any time now.
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0) if read else b""
    finally:
        os.close(descriptor)


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


def _place_of(key: str) -> int:
    """The byte of the lock file that stands for a key; 60 bits, so that no two keys share one."""
    return int(key[:15], 16)


def _lock_byte(descriptor: int, kind: int, place: int, length: int = 1) -> None:
    """Lock or unlock bytes for this open file, waiting for others; length 0 reaches to the end.

    "Open file description" locks (fcntl(2)): unlike POSIX locks they tell threads apart, and
    unlike `flock` they need no file for every key.
    """
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, place, length, 0)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, request)
