"""Where a worker finds frames and embeddings, from its configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from verl.config import DataConfig
from verl.data.cache_dirs import embeds_dir, frames_dir
from verl.data.embed_store import EmbedStore
from verl.data.media import MediaCache, MediaItem
from verl.models.adapter import Adapter
from verl.models.fingerprint import FeatureName
from verl.workers.encoder import MediaEncoder, StoredFeatures

GIB = 2**30


def media_cache(data: DataConfig) -> MediaCache:
    """The decoded frames in `data.cache_dir`."""
    return MediaCache(frames_dir(data.cache_dir), int(data.cache_gib * GIB))


def stored_features(
    name: FeatureName,
    adapter: Adapter,
    data: DataConfig,
    cached_embeds_dir: str | None,
    num_chunk_seq: int = -1,
) -> StoredFeatures:
    """The embeddings in `cached_embeds_dir`, or those in `data.cache_dir` where it is None."""
    assert adapter.vision is not None
    if cached_embeds_dir is not None:
        store = EmbedStore(cached_embeds_dir, 1 << 62)  # nothing is put in, so nothing goes
    else:
        store = EmbedStore(embeds_dir(data.cache_dir), int(data.cache_gib * GIB))
    return StoredFeatures(
        store=store, pixels=adapter.vision, num_chunk_seq=num_chunk_seq, **name._asdict()
    )


def media_of(rows: Iterable[Iterable[MediaItem]]) -> list[MediaItem]:
    """Every piece of media of some rows."""
    return [item for items in rows for item in items]


def media_counts(cache: MediaCache, encoders: Iterable[MediaEncoder]) -> dict[str, int]:
    """Pieces of media that were decoded and encoded here so far, as `video/decoded` and so on."""
    encoded = sum((encoder.encoded for encoder in encoders), Counter())
    return {
        f"{kind}/{what}": counts[kind]
        for what, counts in (("decoded", cache.decoded), ("encoded", encoded))
        for kind in ("video", "image")
    }
