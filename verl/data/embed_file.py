"""One video's stored embeddings as a safetensors file: header, checksums by block, mapping.

No torch: what lists or checks files starts at once. Letters: M visual tokens, E hidden size.
The file holds one tensor, `features` (M, E); its metadata hold `record`, everything else as JSON,
`blocks`, a CRC-32 for every `block_rows` rows, and `crc32` of the two texts before it.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from verl.data.file_store import SUFFIX
from verl.data.safetensors_file import encode_head

BLOCK_BYTES = 4 * 1024 * 1024
FORMAT_VERSION = 1
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
_TENSOR = "features"


class DamagedEmbeds(ValueError):
    """A file of embeddings that is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class EmbedRecord:
    """What a file says about its numbers."""

    key: str
    media: str
    """Content key of the media, `MediaRef.key`."""
    family: str
    weights: str
    dtype: str
    """As safetensors writes it: BF16, F16 or F32."""
    path: str
    """Where the video was when it was encoded; for people, not part of the key."""
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float
    frame_times: tuple[float, ...]
    n_tokens: int
    width: int
    block_rows: int = 0
    made_at: float = 0.0
    """Seconds since 1970."""
    made_by: str = ""
    """Versions of the programs that made it."""

    @property
    def row_bytes(self) -> int:
        return self.width * DTYPE_BYTES[self.dtype]

    @property
    def n_bytes(self) -> int:
        """Bytes of the embeddings alone."""
        return self.n_tokens * self.row_bytes


def map_file(file: BinaryIO, n_bytes: int) -> memoryview:
    """The whole file as memory. Keeps a descriptor open as long as it lives."""
    return memoryview(mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ))


class EmbedFile:
    """A mapped file whose header was checked; raises DamagedEmbeds for a bad one.

    The mapping stays valid when the file is evicted meanwhile.
    """

    def __init__(
        self, path: Path, map_file: Callable[[BinaryIO, int], memoryview] = map_file
    ) -> None:
        self.path = path
        with open(path, "rb") as opened:
            info = os.fstat(opened.fileno())
            self.version = (info.st_ino, info.st_mtime_ns, info.st_size)
            if info.st_size < 16:
                raise DamagedEmbeds(path, f"{info.st_size} bytes are no safetensors file")
            self.map = map_file(opened, info.st_size)
        try:
            self.record, self._blocks, self.offset = _parse(self.map, info.st_size)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedEmbeds(path, f"its header is damaged: {error}") from None
        if path.name != f"{self.record.key}{SUFFIX}":
            raise DamagedEmbeds(path, f"it belongs to the key {self.record.key}")

    def blocks_of(self, start: int, stop: int) -> range:
        """The blocks that hold rows `start` to `stop`."""
        if start >= stop:
            return range(0)
        size = self.record.block_rows
        return range(start // size, (stop + size - 1) // size)

    def check(self, blocks: Iterable[int]) -> None:
        """Compare blocks with their checksums; reads only these. Raises DamagedEmbeds."""
        chosen = list(blocks)
        size = self.record.block_rows * self.record.row_bytes
        sums = _checksums(self.map[self.offset :], size, chosen)
        for block, found in zip(chosen, sums, strict=True):
            if found != self._blocks[block]:
                first = block * self.record.block_rows
                last = min(first + self.record.block_rows, self.record.n_tokens) - 1
                raise DamagedEmbeds(self.path, f"rows {first} to {last} differ from what was put")


def write_embeds(file: BinaryIO, header: bytes, data: memoryview) -> None:
    """Write the file; `header` comes from `encode_header`."""
    file.write(header)
    file.write(data)


def encode_header(record: EmbedRecord, data: memoryview) -> bytes:
    """The bytes that stand before the embeddings."""
    if data.nbytes != record.n_bytes or not record.n_bytes:
        raise ValueError(f"{record.path}: {data.nbytes} bytes are not {record.n_bytes}")
    record = replace(record, block_rows=max(1, BLOCK_BYTES // record.row_bytes))
    n_blocks = -(-record.n_tokens // record.block_rows)
    sums = _checksums(data, record.block_rows * record.row_bytes, list(range(n_blocks)))
    text = json.dumps({"version": FORMAT_VERSION, **asdict(record)})
    blocks = " ".join(f"{value:08x}" for value in sums)
    return encode_head(
        {_TENSOR: (record.dtype, (record.n_tokens, record.width), record.n_bytes)},
        {"record": text, "blocks": blocks, "crc32": _crc_of(text, blocks)},
    )


def read_record(path: Path) -> EmbedRecord:
    """What a file says about itself, without a look at its embeddings. Raises DamagedEmbeds."""
    return EmbedFile(path).record


def check_file(path: Path) -> EmbedRecord:
    """Read all of a file. Raises DamagedEmbeds, or OSError where it cannot be read."""
    file = EmbedFile(path)
    file.check(file.blocks_of(0, file.record.n_tokens))
    return file.record


def _parse(data: memoryview, n_bytes: int) -> tuple[EmbedRecord, list[int], int]:
    """Record, checksums, and where the embeddings begin. Raises for whatever does not fit."""
    (length,) = struct.unpack_from("<Q", data)
    if length > min(_MAX_HEADER_BYTES, n_bytes - 8):
        raise ValueError(f"it claims {length} bytes of {n_bytes}")
    header: dict[str, Any] = json.loads(bytes(data[8 : 8 + length]))
    metadata, tensor = header["__metadata__"], header[_TENSOR]
    if metadata["crc32"] != _crc_of(metadata["record"], metadata["blocks"]):
        raise ValueError("its checksum differs")
    fields = json.loads(metadata["record"])
    if fields.pop("version") != FORMAT_VERSION:
        raise ValueError(f"only version {FORMAT_VERSION} of the format is known")
    fields |= {name: tuple(fields[name]) for name in ("grid_thw", "frame_times")}
    record = EmbedRecord(**fields)
    expected = {
        "dtype": record.dtype,
        "shape": [record.n_tokens, record.width],
        "data_offsets": [0, record.n_bytes],
    }
    if tensor != expected:
        raise ValueError(f"the tensor is {tensor}, expected {expected}")
    if 8 + length + record.n_bytes != n_bytes:
        raise ValueError(f"{n_bytes} bytes are not {8 + length + record.n_bytes}")
    return record, [int(value, 16) for value in metadata["blocks"].split()], 8 + length


def _crc_of(*texts: str) -> str:
    return f"{zlib.crc32(chr(0).join(texts).encode()):08x}"


def _checksums(data: memoryview, block_bytes: int, blocks: list[int]) -> list[int]:
    def of(block: int) -> int:
        return zlib.crc32(data[block * block_bytes : (block + 1) * block_bytes])

    if len(blocks) < 4:
        return [of(block) for block in blocks]
    # CRC-32 lets go of the interpreter, and pages come from the disk in parallel.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(of, blocks))
