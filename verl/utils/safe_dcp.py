"""Torch's distributed checkpoints (DCP), read without running code that a file brings along.

The `.metadata` of a DCP folder is a pickle, which torch loads without restriction. Here it is
loaded through a list of exact names. Tensors inside the shards are read by torch itself with
`weights_only=True`.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from verl.utils.manifest import CheckpointError

METADATA = ".metadata"
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of DCP metadata and nothing else.

    Names must match exactly: with a dotted one such as `os.system`, a pickle reaches through a
    harmless module to whatever that module imports.
    """

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in _ALLOWED:
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(vars(torch).get(global_name), torch.dtype):
            return super().find_class(module_name, global_name)
        raise CheckpointError(
            f"checkpoint metadata asks for {module_name}.{global_name}: refused, since it could "
            "run code. Do not load this checkpoint"
        )


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a DCP folder; raises CheckpointError when damaged, hostile or missing."""
    path = folder / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from error
    except Exception as error:  # A damaged pickle raises almost anything; none of it is ours.
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} does not hold the metadata of a checkpoint")
    for info in metadata.storage_data.values():
        name = info.relative_path
        if Path(name).name != name or info.transform_descriptors:
            raise CheckpointError(f"{path} points to {name!r}: only plain files beside it are read")
    return metadata


def tensor_table(metadata: Metadata) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Dtype and global shape of every tensor, by its full name."""
    return {
        name: (entry.properties.dtype, entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


class SafeReader(FileSystemReader):
    """Reads a DCP folder; its metadata comes from `read_metadata`."""

    def __init__(self, folder: Path, metadata: Metadata | None = None) -> None:
        super().__init__(folder)
        self._metadata = metadata or read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


def save_tensors(folder: Path, state: dict[str, Any]) -> None:
    """Writes a tree of tensors into `folder`, flushed; a collective where there are processes.

    Raises CheckpointError on all ranks when any rank fails, with that rank's reason.
    """
    try:
        with _quiet():
            save(
                state,
                storage_writer=FileSystemWriter(folder, overwrite=False),
                no_dist=not dist.is_initialized(),
            )
    except CheckpointException as error:
        raise CheckpointError(f"cannot write {folder}: {reasons(error)}") from error


def load_tensors(
    folder: Path, state: dict[str, Any], metadata: Metadata, *, alone: bool = False
) -> None:
    """Fills the tensors of `state` in place; a collective unless `alone`.

    Dtypes and shapes must have been compared by the caller: torch casts without a word.
    """
    try:
        with _quiet():
            load(
                state,
                storage_reader=SafeReader(folder, metadata),
                no_dist=alone or not dist.is_initialized(),
            )
    except CheckpointException as error:
        raise CheckpointError(f"cannot read {folder}: {reasons(error)}") from error


def reasons(error: CheckpointException) -> str:
    """The cause on each failed rank in one line: torch's own text is a list of tracebacks."""
    return "; ".join(
        f"rank {rank}: {type(cause).__name__}: {str(cause).strip() or 'no text'}"
        for rank, (cause, _) in sorted(error.failures.items())
    )


def differences(
    wanted: Mapping[str, Tensor], found: Mapping[str, tuple[torch.dtype, torch.Size]]
) -> list[str]:
    """How a model's tensors differ from those of a checkpoint, one sentence a tensor."""
    problems = []
    for name, tensor in wanted.items():
        if name not in found:
            problems.append(f"{name} is not in the checkpoint")
            continue
        dtype, shape = found[name]
        if shape != tensor.shape:
            problems.append(
                f"{name} has shape {tuple(shape)} in the checkpoint and {tuple(tensor.shape)} here"
            )
        elif dtype != tensor.dtype:
            problems.append(f"{name} is {dtype} in the checkpoint and {tensor.dtype} here")
    problems += [f"{name} has no place here" for name in found if name not in wanted]
    return problems


def _quiet() -> warnings.catch_warnings:
    """Silences torch's remark that there is one process only, which is intended where it is so."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)
