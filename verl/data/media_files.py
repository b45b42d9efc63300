"""Media files as bytes on disk: which paths may be opened, and what is wrong with a file.

Nothing here decodes. A path from a data set row is hostile until shown otherwise: FFmpeg would
fetch `http://...`, join files for `concat:a|b`, and wait for ever on a FIFO.
"""

import hashlib
import os
import re
import stat
import struct
from functools import lru_cache
from typing import BinaryIO, Literal, get_args

from verl.utils.exits import Explained

Reason = Literal[
    "missing",
    "empty",
    "not_regular",
    "permission",
    "lfs_pointer",
    "html",
    "truncated",
    "no_video_stream",
    "zero_frames",
    "frame_count_mismatch",
    "too_large",
    "outside_media_dir",
    "remote_address",
    "not_media",
    "decode_error",
    "timeout",
    "changed",
    "bad_segment",
    "crashed",
    "not_encoded",
    "out_of_memory",
]
"""Why a file cannot be used. Codes are stable: metrics and skip counts are keyed by them."""

REMEDIES: dict[str, str] = {
    "missing": "check data.video_dir or data.image_dir and the path in the row",
    "empty": "copy or download the file again",
    "not_regular": "give the path of an ordinary file",
    "permission": "make the file readable for this user",
    "lfs_pointer": "run `git lfs pull` in the data set",
    "html": "the download saved a web page; download the file again",
    "truncated": "copy or download the file again",
    "no_video_stream": "give a file that holds video",
    "zero_frames": "give a file that holds frames",
    "frame_count_mismatch": "re-encode the file, or leave its row out",
    "too_large": "re-encode the file at a lower resolution",
    "outside_media_dir": "move the file, or set data.allow_outside_media_dir=true",
    "remote_address": "download the file first and give its local path",
    "not_media": "give a video or image file",
    "decode_error": "re-encode the file, or leave its row out",
    "timeout": "re-encode the file, or leave its row out",
    "changed": "start the run again, so that the file is measured afresh",
    "bad_segment": "correct start and end of the segment in the row (data.video_start_key, "
    "data.video_end_key)",
    "crashed": "re-encode the file, or leave its row out",
    "not_encoded": "make its embeddings with the settings of this run: python3 -m "
    "verl.utils.cache_video_embeds_vila; or leave cached_embeds_dir out",
    "out_of_memory": "raise data.decode_memory_gib, re-encode the file, or leave its row out",
}
"""What to do about each reason."""

_ADDRESS = re.compile(
    r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*://|(?:async|cache|concat|concatf|crypto|data|fd|file|ftp|gopher"
    r"|hls|http|https|icecast|ipfs|ipns|md5|mms\w*|pipe|prompeg|rist|rtmp\w*|rtp|rtsp|sctp|sftp|smb"
    r"|srt|srtp|tcp|tee|tls|udp|udplite|unix|zmq):|subfile[,:])",
    re.IGNORECASE,
)
_LFS_HEAD = b"version https://git-lfs.github.com/spec/"
_HTML_HEAD = re.compile(
    rb"\s*(?:<\?xml[^>]*>\s*)?<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE
)
_N_BLOCKS, _BLOCK_BYTES = 8, 64 * 1024
_READ_BYTES = 1 << 20
Fingerprint = Literal["fast", "full"]


class BadMedia(Explained, Exception):
    """A media file that cannot be used. `reason` is one of `Reason`; survives pickling."""

    def __init__(self, reason: Reason, path: str, detail: str) -> None:
        if reason not in get_args(Reason):
            raise ValueError(f"unknown reason {reason!r}; use one of {get_args(Reason)}")
        super().__init__(reason, path, detail)
        self.reason: Reason = reason
        self.path = path
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.path}: {self.detail} [{self.reason}]; {REMEDIES[self.reason]}"


def resolve_media_path(path: str, root: str | os.PathLike[str] | None, allow_outside: bool) -> str:
    """Absolute path of a media file named by a data set row, links followed.

    Raises BadMedia as `contained_path`, and for anything that is not a readable regular file with
    bytes in it.
    """
    resolved = contained_path(path, root, allow_outside)
    check_regular(resolved)
    return resolved


def contained_path(path: str, root: str | os.PathLike[str] | None, allow_outside: bool) -> str:
    """Absolute path that a data set row names, links followed, whether or not a file is there.

    A relative path starts at `root` (None: the working directory, and no folder to stay inside).
    Raises BadMedia for addresses and for paths that leave `root` unless `allow_outside`.
    """
    if _ADDRESS.match(path):
        raise BadMedia("remote_address", path, "this is an address, and only local files are read")
    if not path or "\0" in path:
        raise BadMedia("missing", path, "the path is empty or holds a NUL byte")
    resolved = os.path.realpath(os.path.join(root or "", path))
    if root is not None and not allow_outside:
        inside = os.path.realpath(root)
        if os.path.commonpath([inside, resolved]) != inside:
            detail = f"leads to {resolved}, outside of the media folder {inside}"
            raise BadMedia("outside_media_dir", path, detail)
    return resolved


def check_regular(path: str) -> os.stat_result:
    """Size and times of a readable, non-empty regular file; BadMedia for everything else."""
    try:
        info = os.stat(path)
    except PermissionError as error:
        raise BadMedia("permission", path, f"a folder on the way is closed ({error})") from None
    except OSError as error:
        raise BadMedia("missing", path, f"there is no such file ({error.strerror})") from None
    if not stat.S_ISREG(info.st_mode):
        raise BadMedia("not_regular", path, f"this is a {_kind_of(info.st_mode)}, not a file")
    if not os.access(path, os.R_OK):
        raise BadMedia("permission", path, "this user may not read the file")
    if info.st_size == 0:
        raise BadMedia("empty", path, "the file has 0 bytes")
    return info


def check_first_bytes(path: str) -> None:
    """Raise BadMedia when the file is a Git LFS pointer or a saved web page."""
    with open_media(path) as file:
        head = file.read(512)
    if head.startswith(_LFS_HEAD):
        raise BadMedia("lfs_pointer", path, "this is a Git LFS pointer, not the video itself")
    if _HTML_HEAD.match(head.removeprefix(b"\xef\xbb\xbf")):
        raise BadMedia("html", path, "this is a web page")


def open_media(path: str) -> BinaryIO:
    """Open a checked file for reading bytes; errors of the file system become BadMedia."""
    try:
        return open(path, "rb")
    except PermissionError:
        raise BadMedia("permission", path, "this user may not read the file") from None
    except OSError as error:
        raise BadMedia("missing", path, f"cannot be opened ({error.strerror})") from None


def fingerprint(path: str, how: Fingerprint = "fast") -> str:
    """Hex digest that stands for a file's content. Raises BadMedia.

    "fast": size, modification time and 8 blocks spread over it, at most 512 KiB read, so that an
    hour of film costs as little as a clip. "full": every byte and nothing else, so that a copy
    keeps its digest; read again only when the file system says that the file was touched.
    """
    if how not in get_args(Fingerprint):
        raise ValueError(f"fingerprint {how!r}: use one of {', '.join(get_args(Fingerprint))}.")
    info = check_regular(path)
    if how == "full":
        return _full_digest(
            path, (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        )
    digest = hashlib.blake2b(f"{info.st_size} {info.st_mtime_ns}".encode(), digest_size=16)
    last_start = max(0, info.st_size - _BLOCK_BYTES)
    with open_media(path) as file:
        for i in range(_N_BLOCKS):
            file.seek(last_start * i // (_N_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _full_digest(path: str, state: tuple[int, ...]) -> str:
    """Digest of all bytes; `state` is what any writing to the file changes."""
    digest = hashlib.blake2b(b"full", digest_size=16)
    with open_media(path) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def is_cut_short(path: str) -> bool:
    """Whether the container's own sizes say that bytes are missing at the end.

    Knows MP4/QuickTime boxes, RIFF (AVI) and EBML (Matroska, WebM); False for anything else.
    """
    size = check_regular(path).st_size
    with open_media(path) as file:
        head = file.read(12)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return _mp4_is_cut_short(file, size)
        if head[:4] == b"RIFF" and len(head) >= 8:
            return 8 + struct.unpack("<I", head[4:8])[0] > size
        if head[:4] == b"\x1aE\xdf\xa3":
            return _ebml_is_cut_short(file, size)
    return False


def mp4_rotation(path: str, track_id: int) -> int:
    """Degrees (0, 90, 180, 270) clockwise that a player turns this MP4/QuickTime track.

    Read from the track header's matrix (ISO/IEC 14496-12, 8.3.2); 0 when there is none. PyAV
    tells it only for a decoded frame.
    """
    size = os.path.getsize(path)
    with open_media(path) as file:
        for moov in _boxes(file, 0, size, b"moov"):
            for trak in _boxes(file, *moov, b"trak"):
                for start, end in _boxes(file, *trak, b"tkhd"):
                    file.seek(start)
                    found = _rotation_of_track_header(file.read(min(end - start, 128)), track_id)
                    if found is not None:
                        return found
    return 0


def _rotation_of_track_header(header: bytes, track_id: int) -> int | None:
    id_at, matrix_at = (20, 52) if header[:1] == b"\x01" else (12, 40)
    if len(header) < matrix_at + 20 or struct.unpack_from(">I", header, id_at)[0] != track_id:
        return None
    a, b, _, c, d = struct.unpack_from(">5i", header, matrix_at)
    turns = {(1, 0, 0, 1): 0, (0, 1, -1, 0): 90, (-1, 0, 0, -1): 180, (0, -1, 1, 0): 270}
    return turns.get(tuple((value > 0) - (value < 0) for value in (a, b, c, d)), 0)  # type: ignore[arg-type]


def _boxes(file: BinaryIO, start: int, end: int, name: bytes) -> list[tuple[int, int]]:
    """Content ranges of the boxes called `name` that lie between two offsets."""
    found = []
    while start + 8 <= end:
        file.seek(start)
        length, kind, header = _box_header(file)
        if length < header:
            break
        if kind == name:
            found.append((start + header, min(start + length, end)))
        start += length
    return found


def _box_header(file: BinaryIO) -> tuple[int, bytes, int]:
    """Length, name and header length of the MP4 box that begins here; length 0 at the end."""
    head = file.read(16)
    if len(head) < 8:
        return 0, b"", 8
    length, kind = struct.unpack_from(">I4s", head)
    if length == 1 and len(head) == 16:
        return struct.unpack_from(">Q", head, 8)[0], kind, 16
    if length == 0:  # The box reaches to the end of the file.
        return os.fstat(file.fileno()).st_size - file.tell() + len(head), kind, 8
    return length, kind, 8


def _mp4_is_cut_short(file: BinaryIO, size: int) -> bool:
    start, has_moov = 0, False
    while start < size:
        file.seek(start)
        length, kind, header = _box_header(file)
        if length < header or start + length > size:
            return True
        has_moov = has_moov or kind == b"moov"
        start += length
    return not has_moov


def _ebml_is_cut_short(file: BinaryIO, size: int) -> bool:
    file.seek(4)
    header_length = _ebml_number(file)
    if header_length is None:
        return True
    file.seek(header_length, os.SEEK_CUR)
    if file.read(4) != b"\x18S\x80g":
        return True
    segment_length = _ebml_number(file)
    return segment_length is not None and file.tell() + segment_length > size


def _ebml_number(file: BinaryIO) -> int | None:
    """Variable-length number of EBML (RFC 8794, section 4); None where the length is unknown."""
    first = file.read(1)
    if not first or first == b"\0":
        return None
    n_more = 8 - first[0].bit_length()
    rest = file.read(n_more)
    value = int.from_bytes(bytes([first[0] & ((1 << (7 - n_more)) - 1)]) + rest, "big")
    return None if value == (1 << (7 * (n_more + 1))) - 1 else value


def _kind_of(mode: int) -> str:
    names = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return names.get(stat.S_IFMT(mode), "device")
