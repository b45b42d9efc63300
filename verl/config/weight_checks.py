"""Weight files by their headers alone: whole, no Git-LFS pointers, and room for a checkpoint."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.config.problems import Problem

if TYPE_CHECKING:
    from verl.config.trainer import TrainerConfig
    from verl.config.worker import ModelConfig

_LFS = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100 << 20
_WEIGHT_BYTES, _ADAM_BYTES = 4, 8
"""A checkpoint holds float32 weights, and two float32 moments of every trained parameter."""


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: `{name: {dtype, shape, data_offsets}}`.

    Raises ValueError, with what to do, when the file is a pointer, cut off or something else.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if _LFS.startswith(start) and len(start) == 8:
            raise ValueError("is a Git-LFS pointer, not weights; run `git lfs pull` in its folder")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _MAX_HEADER_BYTES + 1
        if length > min(_MAX_HEADER_BYTES, size):
            raise ValueError("is not a safetensors file; download it again")
        try:
            header = json.loads(file.read(length))
            tensors = {name: v for name, v in header.items() if name != "__metadata__"}
            end = max((int(v["data_offsets"][1]) for v in tensors.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise ValueError("is not a safetensors file; download it again") from None
    if size != 8 + length + end:
        raise ValueError(f"has {size} bytes instead of {8 + length + end}; download it again")
    return tensors


def weight_problems(key: str, folder: Path) -> Iterator[Problem]:
    """Weight files that could not be loaded."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_header(path)
        except ValueError as error:
            yield Problem((key,), f"{key}={folder}: {path.name} {error}")
        except OSError as error:
            yield Problem((key,), f"{key}={folder}: {path.name} cannot be read ({error.strerror})")


def checkpoint_bytes(model: ModelConfig) -> int | None:
    """Size of one checkpoint; None when the weights are not at hand."""
    total = 0
    for path in Path(model.model_path).glob("*.safetensors"):
        try:
            tensors = read_header(path)
        except (ValueError, OSError):
            return None
        for name, tensor in tensors.items():
            frozen = model.freeze_vision_tower and "visual." in name
            count = math.prod(tensor.get("shape", ()))
            total += count * (_WEIGHT_BYTES + (0 if frozen else _ADAM_BYTES))
    return total or None


def disk_problems(trainer: TrainerConfig, model: ModelConfig) -> Iterator[Problem]:
    """There must be room for the checkpoint that is written at the end, at least."""
    need = None if trainer.val_only else checkpoint_bytes(model)
    folder = trainer.checkpoint_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need is not None and free < need:
        gib = 1 << 30
        yield Problem(
            ("trainer.save_checkpoint_path",),
            f"trainer.save_checkpoint_path={trainer.checkpoint_dir}: a checkpoint needs about "
            f"{need / gib:.1f} GiB, and {free / gib:.1f} GiB are free at {folder}; "
            "free some or choose another path",
        )
