"""Images that a data set holds as bytes, kept as files that the media code can open.

Parquet files and the `datasets` library store an image as `{"bytes": ..., "path": ...}`. Each is
written once, under the hash of its content, and its row then names it `inline:<hash>`: the same on
every machine, so that the order of rows can be resumed elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from verl.data.cache_dirs import cache_root
from verl.utils.manifest import fsync

if TYPE_CHECKING:
    from verl.config import DataConfig

_NAME = re.compile(r"inline:([0-9a-f]{32})")


class InlineImages:
    """A folder of images under the hash of their bytes; made when the first one is kept."""

    def __init__(self, data: DataConfig) -> None:
        self._cache = cache_root(data.cache_dir)
        self._folder = self._cache / "inline"
        self._sound: set[str] = set()

    def keep(self, content: bytes) -> str:
        """Writes an image unless it is there, and returns its name for rows.

        The first time that an object meets an image, all bytes of the file are compared: a damaged
        one is written anew.
        """
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        if digest not in self._sound:
            path = self._folder / digest
            if not (path.is_file() and path.read_bytes() == content):
                self._write(path, content)
            self._sound.add(digest)
        return f"inline:{digest}"

    def _write(self, path: Path, content: bytes) -> None:
        # Closed to other users, like the frames beside it.
        for folder in (self._cache, self._folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._folder / f".tmp-{uuid.uuid4().hex}"
        try:
            temporary.write_bytes(content)
            # Part of the key of decoded frames, which would else be made anew for every copy.
            os.utime(temporary, (0, 0))
            # A name that is lost in a crash is written again; a name without its content is not.
            fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def path_of(self, name: str) -> str | None:
        """The file of a name that `keep` returned; None for any other path of a row."""
        match = _NAME.fullmatch(name)
        return str(self._folder / match[1]) if match else None
