"""What lies where in `data.cache_dir`. Paths alone: nothing is made, nothing is imported.

`frames/` holds decoded frames (`verl.data.media.MediaCache`), `embeds/` embeddings of them
(`verl.data.embed_store.EmbedStore`), `index/` what was measured of video files
(`verl.data.media_index.MediaIndex`).
"""

import os
import tempfile
from pathlib import Path

__all__ = ["cache_root", "default_cache_dir", "embeds_dir", "frames_dir", "index_dir"]

CacheDir = str | os.PathLike[str] | None
"""As in `data.cache_dir`: None is a folder in the system's folder for temporary files."""


def default_cache_dir() -> Path:
    """A folder of this user in the system's folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"long-rl-frames-{os.getuid()}"


def cache_root(cache_dir: CacheDir) -> Path:
    """The folder that holds all of them."""
    return Path(cache_dir) if cache_dir else default_cache_dir()


def frames_dir(cache_dir: CacheDir) -> Path:
    """Decoded frames."""
    return cache_root(cache_dir) / "frames"


def embeds_dir(cache_dir: CacheDir) -> Path:
    """Embeddings."""
    return cache_root(cache_dir) / "embeds"


def index_dir(cache_dir: CacheDir) -> Path:
    """What was measured of video files."""
    return cache_root(cache_dir) / "index"
