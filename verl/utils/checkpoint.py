"""The driver's half of a checkpoint: folders that are complete or do not exist.

    root/global_step_8/actor/...            what the workers wrote (`verl.utils.shards`)
                       actor/huggingface/   config, tokenizer, processor, for the merger
                       driver_state.json    step, data cursor, KL controller, ... and the config
                       manifest.json        size and sha256 of every file
    root/checkpoint_tracker.json            the newest one

A checkpoint is written to `global_step_8.tmp-<random>`, flushed, and renamed. Nothing is ever
written into an existing one, and one is deleted by renaming it first, so that a process killed at
any moment leaves either a whole checkpoint or a name that nobody picks. A manifest's `serial`
counts the checkpoints of a folder and says which is the newest; `origin` is the digest of the
checkpoint that `trainer.load_checkpoint_path` named when the run was started.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from verl.utils.manifest import (
    MANIFEST,
    CheckpointError,
    check_files,
    check_sizes,
    files_under,
    fingerprint,
    from_json,
    fsync,
    fsync_tree,
    git_revision,
    hash_files,
    read_json,
    read_manifest,
    refuse,
    replace_json,
    to_json,
    versions,
    write_json,
    write_manifest,
)
from verl.utils.shards import read_shards, write_shards

__all__ = [
    "CheckpointDir",
    "CheckpointError",
    "changed_keys",
    "find_checkpoint",
    "read_driver_state",
    "read_shards",
    "resolve_checkpoint",
    "verify_checkpoint",
    "write_shards",
]
logger = logging.getLogger(__name__)
DRIVER_STATE = "driver_state.json"
TRACKER = "checkpoint_tracker.json"
ASSETS = "huggingface"
_NAME = re.compile(r"global_step_(\d+)")
_LEFTOVER = re.compile(r"global_step_\d+\.(tmp|old)-[0-9a-f]+")


class CheckpointDir:
    """A checkpoint that is being written; a context manager.

    consumes: an empty temporary folder, `path`, that workers fill; produces: a checkpoint, once
    `commit` is called. Leaving the context without it removes the folder.

        with CheckpointDir(root, step=8) as checkpoint:
            workers.save_shards(str(checkpoint.path / "actor"))
            checkpoint.commit({"step": 8, ...}, config=config, keep=3)
    """

    def __init__(self, root: Path, step: int) -> None:
        self.root = root
        self.step = step
        self.path = root / f"global_step_{step}.tmp-{uuid.uuid4().hex}"

    def __enter__(self) -> CheckpointDir:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.root)
            self.path.mkdir()
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints to {self.root}: {error}; set "
                "trainer.save_checkpoint_path to a folder that is writable"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def commit(
        self,
        driver_state: Mapping[str, Any],
        *,
        config: Mapping[str, Any],
        keep: int = -1,
        origin: str | None = None,
    ) -> Path:
        """Makes the checkpoint valid, then removes older ones beyond `keep`; returns its folder.

        `origin` is what `origin_of` says of the checkpoint that the run started from; that one is
        never removed, since the same command names it again.
        `driver_state` must be JSON. Raises CheckpointError when the disk is full or a file that a
        worker wrote is not there; earlier checkpoints then stay as they are.
        """
        try:
            write_json(
                self.path / DRIVER_STATE, {"state": dict(driver_state), "config": dict(config)}
            )
            self._write_manifest(config, origin)
            fsync_tree(self.path)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error}; earlier checkpoints are intact"
            ) from error
        final = self.root / f"global_step_{self.step}"
        if final.exists():  # An earlier run's; it stays under another name until we have its place.
            final.rename(self.root / f"{final.name}.old-{uuid.uuid4().hex}")
        self.path.rename(final)
        fsync(self.root)
        write_tracker(self.root, final)
        prune(self.root, keep, origin)
        remove_leftovers(self.root)
        return final

    def _write_manifest(self, config: Mapping[str, Any], origin: str | None) -> None:
        known = self._records_of_workers()
        missing = check_sizes(self.path, from_json(known))
        if missing:
            raise CheckpointError(
                f"{self.path}: {'; '.join(missing[:5])}. Workers wrote it on another machine? "
                "trainer.save_checkpoint_path must be on storage that all nodes share"
            )
        names = [n for n in files_under(self.path) if n not in known]
        files = known | to_json(hash_files(self.path, names))
        content = {
            "step": self.step,
            "serial": 1 + max(_serials(self.root).values(), default=0),
            "origin": origin,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "config_fingerprint": fingerprint(config),
            "git": git_revision(),
            "versions": versions(),
            "files": files,
        }
        write_manifest(self.path, content)

    def _records_of_workers(self) -> dict[str, dict[str, Any]]:
        """Records that roles hashed themselves, so that the driver need not read the shards."""
        records = {}
        for manifest in self.path.glob(f"*/{MANIFEST}"):
            for name, record in read_manifest(manifest.parent)["files"].items():
                records[f"{manifest.parent.name}/{name}"] = record
        return records


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Reads every byte of a checkpoint; returns its manifest.

    Raises CheckpointError naming the damaged files. Files under `huggingface/` are left out: a
    resume needs none of them, and the merger writes there.
    """
    manifest = read_manifest(path)
    records = from_json(manifest.get("files", {}))
    if DRIVER_STATE not in records:
        raise CheckpointError(f"{path / MANIFEST} does not list {DRIVER_STATE}: it is damaged")
    needed = {n: r for n, r in records.items() if ASSETS not in Path(n).parts}
    refuse(path, check_files(path, needed))
    return manifest


def read_driver_state(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `commit` was given: (driver state, config). Verify the checkpoint first."""
    content = read_json(path / DRIVER_STATE)
    return content["state"], content["config"]


def find_checkpoint(root: Path, *, repair: bool = True) -> Path | None:
    """The newest intact checkpoint under `root`; None where there has never been one.

    `repair` puts back what an interrupted save moved: only where no other run may be saving.

    Damaged ones are skipped, and each is logged as an error with its reason. When none is usable,
    raises CheckpointError: a run that has checkpoints never starts from scratch by itself.
    """
    if not root.is_dir():
        return None
    if repair:
        recover(root)
    serials = _serials(root)
    if not serials:
        return None
    path, reasons = _newest_intact(serials)
    if path is not None:
        return path
    raise CheckpointError(
        f"none of the {len(serials)} checkpoints in {root} can be used: {'; '.join(reasons[:3])}. "
        "To start from scratch, move them away or set trainer.find_last_checkpoint=false"
    )


def _newest_intact(serials: Mapping[Path, int]) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, if one is, and what is wrong with those before it."""
    reasons: list[str] = []
    # Those without a readable manifest cannot be ordered: they come first, so that they are named.
    for path in sorted(serials, key=lambda p: (serials[p] == 0, serials[p]), reverse=True):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.error("NOT resuming from %s, looking for an earlier one: %s", path, error)
            reasons.append(str(error))
            continue
        if reasons:
            logger.error("falling back to %s: %d others could not be used", path, len(reasons))
        return path, reasons
    return None, reasons


def origin_of(path: Path) -> str:
    """What tells a checkpoint from all others, wherever it is moved."""
    return str(read_manifest(path)["digest"])


def resolve_checkpoint(
    root: Path, explicit: Path | None, automatic: bool, *, repair: bool = True
) -> Path | None:
    """The checkpoint to start from, verified, or None for a fresh start.

    A given path (`trainer.load_checkpoint_path`) is used or is an error; only automatic mode
    (`trainer.find_last_checkpoint`) looks for another one: for the newest that a run which was
    started from the given one has made in `root`, and for an earlier one where that is damaged.
    """
    if explicit is None:
        return find_checkpoint(root, repair=repair) if automatic else None
    path = _given(explicit)
    own = _newest_since(root, path, repair=repair) if automatic else None
    if own is None:
        return path
    logger.warning(
        "trainer.load_checkpoint_path=%s is where this run started; it has made checkpoints of its "
        "own since, and goes on from the newest of them, %s. To start from %s again, set "
        "trainer.find_last_checkpoint=false or another trainer.save_checkpoint_path",
        explicit, own, path.name,
    )  # fmt: skip
    return own


def _newest_since(root: Path, path: Path, *, repair: bool) -> Path | None:
    """The newest intact checkpoint in `root` of a run that was started from `path`, if any."""
    if not root.is_dir():
        return None
    if repair:
        recover(root)
    origin = origin_of(path)
    serials = {p: s for p, s in _serials(root).items() if s and _origin(p) == origin}
    return _newest_intact(serials)[0]


def _origin(path: Path) -> str | None:
    """The origin that a readable manifest names."""
    return read_manifest(path).get("origin")


def _given(explicit: Path) -> Path:
    """The folder that `trainer.load_checkpoint_path` names, verified."""
    path = explicit.parent if explicit.name == "actor" else explicit
    if not path.is_dir():
        raise CheckpointError(
            f"trainer.load_checkpoint_path={explicit} does not exist; {_hint(path.parent)}"
        )
    if not (path / MANIFEST).exists() and _serials(path):
        raise CheckpointError(
            f"trainer.load_checkpoint_path={explicit} holds several checkpoints; {_hint(path)}"
        )
    verify_checkpoint(path)
    return path


def _hint(folder: Path) -> str:
    serials = _serials(folder) if folder.is_dir() else {}
    if not serials:
        return f"there is no folder global_step_N in {folder}"
    newest = max(serials, key=lambda p: (serials[p], _step(p)))
    return f"the newest in {folder} is {newest}"


def changed_keys(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Settings that differ between two configs, as `key: old -> new`, nested keys dotted."""
    old, new = _flat(saved), _flat(current)
    return [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]


_ABSENT = object()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def write_tracker(root: Path, newest: Path) -> None:
    """Names the newest checkpoint for tools and people; resuming reads the manifests instead."""
    content = {"last_global_step": _step(newest), "last_checkpoint": newest.name}
    replace_json(root / TRACKER, content)


def prune(root: Path, keep: int, origin: str | None = None) -> None:
    """Deletes all but the newest `keep` readable checkpoints; -1 keeps all, damaged ones stay.

    The one that the run started from, `origin`, stays, too.
    """
    if keep < 0:
        return
    serials = {p: s for p, s in _serials(root).items() if s > 0}
    for path in sorted(serials, key=lambda p: serials[p], reverse=True)[max(keep, 1) :]:
        if origin is not None and origin_of(path) == origin:
            continue
        doomed = root / f"{path.name}.tmp-{uuid.uuid4().hex}"
        path.rename(doomed)
        shutil.rmtree(doomed)


def recover(root: Path) -> None:
    """Puts back a checkpoint whose replacement was interrupted between its two renames."""
    for path in root.glob("global_step_*.old-*"):
        final = root / path.name.partition(".")[0]
        if _LEFTOVER.fullmatch(path.name) and not final.exists():
            path.rename(final)


def remove_leftovers(root: Path) -> None:
    """Deletes what interrupted saves and deletions left behind."""
    recover(root)
    for path in root.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            logger.info("removing %s, left over from an interrupted save", path)
            shutil.rmtree(path)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _serials(root: Path) -> dict[Path, int]:
    """Checkpoints in `root` with their serial numbers; 0 where the manifest cannot be read."""
    found = {}
    for path in root.glob("global_step_*"):
        if _NAME.fullmatch(path.name) and path.is_dir():
            try:
                found[path] = int(read_manifest(path).get("serial", 0))
            except CheckpointError:
                found[path] = 0
    return found
