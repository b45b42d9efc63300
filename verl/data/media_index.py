"""What was measured of media, kept between runs: key, grid, tokens and times without the file.

One JSON file a name and way to look at it, under `<data.cache_dir>/index/`. It is written under a
temporary name and renamed, so that processes may share the folder. A file that is there is always
compared with its entry; of one that is gone the entry is used as it is, since its frames or its
embeddings may be stored. Entries of images are written by offline caching alone: to any other run
an entry would cost more than measuring.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verl.data import media
from verl.data.decoders import Decoder
from verl.data.media import MediaItem, MediaRef, Reading, content_key
from verl.data.media_files import BadMedia, check_regular, fingerprint
from verl.data.preprocess import MediaKind, ResizeRule
from verl.data.video import FrameSampling
from verl.utils.manifest import fsync

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Layout of an entry."""


@dataclass(frozen=True, kw_only=True)
class MediaLook:
    """A file and how it is looked at: what an entry is found by."""

    kind: MediaKind
    path: str
    """Absolute, from `contained_path`: links followed."""
    name: str
    """Absolute path as the row has it, links not followed: each name of a file has an entry, and
    a link that is removed with the videos keeps its own."""
    sampling: FrameSampling | None
    """None for an image."""
    resize: ResizeRule
    decoder: Decoder
    reading: Reading

    def described(self) -> dict[str, Any]:
        """All that the entry depends on beside the content of the file; in JSON's types."""
        described = {
            "kind": self.kind,
            "name": self.name,
            "sampling": None if self.sampling is None else asdict(self.sampling),
            "resize": asdict(self.resize),
            "decoder": self.decoder,
            "fingerprint_mode": self.reading.fingerprint,
            "version": [_FORMAT, media.FORMAT_VERSION],
        }
        return json.loads(json.dumps(described))

    def key(self, digest: str) -> str:
        """`MediaRef.key` of a file with this fingerprint."""
        return content_key(digest, self.kind, self.sampling, self.resize, self.decoder)


class _Damaged(ValueError):
    """An entry that cannot be used; the message says why."""


class MediaIndex:
    """Entries under `root`, which is made when the first one is written."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def path_of(self, look: MediaLook) -> Path:
        """The file of an entry, whether or not it exists."""
        text = json.dumps(look.described(), sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return self.root / f"{digest}.json"

    def item(
        self, look: MediaLook, measure: Callable[[], MediaItem], *, remember: bool = True
    ) -> MediaItem:
        """What is known of a file; `measure` is called where that is not known yet.

        Without `remember` only what is known already is kept right, and no new entry written.
        Raises BadMedia: what `measure` raises, and `missing` for a file that is neither there nor
        known.
        """
        path = self.path_of(look)
        try:
            check_regular(look.path)
        except BadMedia as error:
            if error.reason != "missing":
                raise
            return self._of_gone_file(look, path, error)
        if not remember and not os.path.exists(path):
            return measure()
        digest = fingerprint(look.path, look.reading.fingerprint)
        try:
            entry = _read(path)
            if entry is not None and entry["fingerprint"] == digest:
                return _item_of(look, entry)
        except _Damaged as damage:
            logger.warning("%s: index entry %s %s: made again", look.path, path, damage)
        else:
            if entry is not None:
                logger.warning(
                    "%s is another %s than was measured before under this name: measured anew",
                    look.path, look.kind,
                )  # fmt: skip
        return self._measured(look, path, digest, measure)

    def _measured(
        self, look: MediaLook, path: Path, digest: str, measure: Callable[[], MediaItem]
    ) -> MediaItem:
        # Whatever comes of it, what was known is of another file, or damaged.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        item = measure()
        # A file that is replaced at this moment has the content of neither: not remembered.
        if item.ref.key == look.key(digest):
            _write(path, _entry_of(look, item, digest))
        return item

    def _of_gone_file(self, look: MediaLook, path: Path, missing: BadMedia) -> MediaItem:
        try:
            entry = _read(path)
            if entry is not None:
                return _item_of(look, entry)
            known = f"the index of media measured before ({self.root}) does not know it either"
        except _Damaged as damage:
            known = f"its entry {path} of the index of media measured before {damage}"
        raise BadMedia("missing", look.path, f"{missing.detail}, and {known}") from None


def _entry_of(look: MediaLook, item: MediaItem, digest: str) -> dict[str, Any]:
    return {
        **look.described(),
        "path": item.ref.path,
        "fingerprint": digest,
        "key": item.ref.key,
        "source_shape": item.ref.source_shape,
        "grid_thw": item.grid_thw,
        "n_tokens": item.n_tokens,
        "seconds_per_grid": item.seconds_per_grid,
        "frame_times": item.frame_times,
    }


def _item_of(look: MediaLook, entry: Mapping[str, Any]) -> MediaItem:
    """The item as `make_media_item` made it. Raises _Damaged for an entry of something else."""
    if any(entry.get(name) != value for name, value in look.described().items()):
        raise _Damaged(f"is about another {look.kind} or another way to look at it")
    if entry["key"] != look.key(entry["fingerprint"]):
        raise _Damaged(f"names a key that is not that of its {look.kind}")
    n_frames, height, width = entry["source_shape"]
    t, h, w = entry["grid_thw"]
    ref = MediaRef(
        kind=look.kind,
        # The path of today: a link may lead elsewhere than when the entry was written, and where
        # a row may read is decided anew in each run.
        path=look.path,
        sampling=look.sampling,
        resize=look.resize,
        key=entry["key"],
        decoder=look.decoder,
        source_shape=(n_frames, height, width),
        reading=look.reading,
    )
    return MediaItem(
        ref=ref,
        grid_thw=(t, h, w),
        seconds_per_grid=entry["seconds_per_grid"],
        n_tokens=entry["n_tokens"],
        frame_times=tuple(entry["frame_times"]),
    )


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """An entry; None when there is none. Raises _Damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Damaged(f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise _Damaged(f"is damaged ({error})") from None
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise _Damaged("is damaged (its checksum differs)")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """One field a line. A disk that refuses it costs the next run the measuring, and no more."""
    fields = {**content, "checksum": _checksum(content)}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}")
    try:
        # Closed to other users: whoever can write here decides what the model sees.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text("{" + ",\n ".join(lines) + "}\n", encoding="utf-8")
        fsync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s could not be written: %s", path, error)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
