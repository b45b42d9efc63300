"""Tensors on a local disk under content keys: bounded, shared by processes, safe to kill.

One safetensors file a key in a `FileStore`, mapped into memory when it is read.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from verl.data.file_store import FileStore, StoreCounts
from verl.data.safetensors_file import encode_head

__all__ = ["Entry", "StoreCounts", "TensorStore"]

_CHECKSUM = "crc32"
_DTYPES = {
    torch.float64: "F64", torch.int64: "I64",
    torch.float32: "F32", torch.int32: "I32",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int16: "I16",
    torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
"""What the format calls the types, widest first: in this order all tensors are aligned."""


@dataclass(frozen=True)
class Entry:
    """What is stored under one key; tensors that come from a file are mapped, not read."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class TensorStore:
    """Files under `root`, at most `limit_bytes` of them; the least recently used go first.

    Several processes and threads may use one folder, each through its own or a shared object.
    """

    def __init__(self, root: str | os.PathLike[str], limit_bytes: int) -> None:
        self._files = FileStore(root, limit_bytes)
        self._checked: dict[str, tuple[int, int, int]] = {}

    @property
    def root(self) -> Path:
        return self._files.root

    @property
    def limit_bytes(self) -> int:
        return self._files.limit_bytes

    @property
    def counts(self) -> StoreCounts:
        """What this object did so far."""
        return self._files.counts

    def path_of(self, key: str) -> Path:
        """The file of a key, whether or not it exists."""
        return self._files.path_of(key)

    def get(self, key: str) -> Entry | None:
        """The entry of a key, None when there is none. A damaged file is named and removed."""
        path = self.path_of(key)
        inode = 0
        try:
            with open(path, "rb") as file:
                info = os.fstat(file.fileno())
                inode = info.st_ino
                entry = _read(file)
                damage = self._damage(key, (inode, info.st_mtime_ns, info.st_size), entry)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            entry, damage = None, str(error)
        if entry is None or damage is not None:
            self._files.discard(path, inode, str(damage))
            return None
        self._files.touch(path)
        self._files.count("hits")
        return entry

    def get_or_make(self, key: str, make: Callable[[], Entry]) -> Entry:
        """The entry of a key; calls `make` and stores its result when there is none.

        Of several processes and threads that miss the same key, one makes it and the others
        wait for it. What `make` raises passes through, and the next one tries.
        """
        entry = self.get(key)
        if entry is not None:
            return entry
        with self._files.making([key]):
            entry = self.get(key)
            if entry is None:
                self._files.count("misses")
                entry = make()
                self.put(key, entry)
        return entry

    def put(self, key: str, entry: Entry) -> bool:
        """Store an entry; False, with a log line, when it does not fit or the disk refuses it."""
        whole = {name: tensor.contiguous() for name, tensor in _widest_first(entry.tensors)}
        metadata = {**entry.metadata, _CHECKSUM: _checksum(whole)}
        described = {n: (_DTYPES[t.dtype], t.shape, t.nbytes) for n, t in whole.items()}
        parts = [encode_head(described, metadata), *map(_bytes_of, whole.values())]
        return self._files.commit(key, sum(map(len, parts)), lambda file: file.writelines(parts))

    def hold(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """While inside, no process evicts any of `keys`, stored already or not.

        A disk that refuses even this leaves them unprotected, with a log line.
        """
        return self._files.hold(keys)

    def size_bytes(self) -> int:
        """Bytes of all stored entries."""
        return self._files.size_bytes()

    def _damage(self, key: str, version: tuple[int, int, int], entry: Entry) -> str | None:
        """Compare the checksum, once for each version of a file that this process sees."""
        if self._checked.get(key) == version:
            return None
        if _checksum(entry.tensors) != entry.metadata.get(_CHECKSUM):
            return "its checksum differs"
        self._checked[key] = version
        return None


def _read(opened: BinaryIO) -> Entry:
    # safetensors opens a file twice, and another process may evict it in between; by way of a
    # descriptor it finds the same bytes both times.
    name = f"/proc/self/fd/{opened.fileno()}"
    with safe_open(name, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Entry(tensors, dict(file.metadata() or {}))


def _widest_first(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    order = list(_DTYPES)
    return sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(_bytes_of(tensors[name]), value)
    return f"{value:08x}"
