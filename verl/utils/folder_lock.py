"""A folder that one run at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO
from weakref import WeakValueDictionary

from verl.utils.manifest import CheckpointError

logger = logging.getLogger(__name__)
LOCK = "run.lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FolderLock:
    """The right to write to a checkpoint folder, held as long as this object lives.

    The kernel takes it back when the process ends, however it ends. Reading needs no lock. The file
    `run.lock` stays behind: it is not its presence that locks, and its text is only for people.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError when another process holds it, or the folder is not writable."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints to {folder}: {error}; set "
                "trainer.save_checkpoint_path to a folder that is writable"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise CheckpointError(_taken(folder, self._file)) from error
            logger.warning("%s cannot be locked (%s): let no other run use it", folder, error)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()


def _taken(folder: Path, file: TextIO) -> str:
    file.seek(0)
    holder = file.read(200).strip() or "another process"
    file.close()
    return (
        f"{folder} is in use by {holder}: two runs in one checkpoint folder would destroy each "
        "other's checkpoints. Wait until that one ends or stop it, or give this run a folder of "
        "its own with trainer.save_checkpoint_path or trainer.experiment_name"
    )


_held: WeakValueDictionary[Path, FolderLock] = WeakValueDictionary()
"""Of this process. A lock belongs to an open file, so that a second one would meet the first."""


def lock_folder(folder: Path) -> FolderLock:
    """The lock of a folder; runs of one process, one after the other, share it.

    Raises CheckpointError, with the other process and what to do, when another one holds it.
    """
    key = folder.resolve()
    lock = _held.get(key)
    if lock is None:
        lock = _held[key] = FolderLock(folder)
    return lock
