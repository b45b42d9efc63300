"""How many videos a run had to decode and to encode: once each, and not at all when stored."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from verl.config import DataConfig
from verl.data.loader import PromptLoader
from verl.data.media import MediaCache, MediaKind
from verl.data.sources import DataError
from verl.models.adapter import Adapter
from verl.utils.manifest import replace_json
from verl.workers.media_stores import stored_features

logger = logging.getLogger(__name__)
MEDIA_FILE = "media.json"
KINDS: tuple[MediaKind, ...] = ("video", "image")
WHAT = ("distinct", "decoded", "encoded")


class MediaLedger:
    """Counts media over the driver, whose loaders decode ahead, and all workers.

    A video is as distinct as the frames that are taken of it: the same file at another number of
    frames, segment or size is another one.
    """

    def __init__(
        self, cache: MediaCache, loaders: Iterable[PromptLoader[Any]], workers: Any
    ) -> None:
        self._cache = cache
        self._loaders = list(loaders)
        self._workers = workers

    def skip_encoded(
        self, adapter: Adapter, data: DataConfig, cached_embeds_dir: str | None
    ) -> None:
        """Tells the loaders which embeddings are stored, so that nothing is decoded for them."""
        name = self._workers.feature_name()[0]
        if name is None and cached_embeds_dir is not None:
            raise DataError(
                f"cached_embeds_dir={cached_embeds_dir}: this model reads no images or videos; "
                "leave the key out"
            )
        if name is None:
            return
        stored = stored_features(name, adapter, data, cached_embeds_dir)
        must_be = cached_embeds_dir is not None
        for loader in self._loaders:
            loader.skip_encoded(stored.is_sound if must_be else stored.has, must_be=must_be)

    def counts(self) -> dict[str, float]:
        """Distinct, decoded and encoded videos of this process and its workers so far.

        Images are counted likewise, under `image/`; kinds that a run has not met are left out.
        """
        shown = [key.partition(" ")[0] for key in self.shown]
        totals: dict[str, float] = {}
        for kind in KINDS:
            totals[f"{kind}/distinct"] = float(shown.count(kind))
            totals[f"{kind}/decoded"] = float(self._cache.decoded[kind])
        for share in self._workers.media_counts():
            for name, n in share.items():
                totals[name] = totals.get(name, 0.0) + n
        met = {kind for kind in KINDS if any(totals.get(f"{kind}/{w}") for w in WHAT)}
        return {name: n for name, n in totals.items() if name.partition("/")[0] in met}

    @property
    def shown(self) -> set[str]:
        """Kind and key of everything that was read for batches so far."""
        return set().union(*(loader.shown for loader in self._loaders))

    def write(self, path: Path) -> None:
        """Keeps what this process counted, and every key that any process wrote here.

        So a run that is repeated, with everything stored, says as many distinct videos and that
        none of them was decoded or encoded.
        """
        before = _read(path)
        shown = self.shown | (before.shown if before else set())
        replace_json(path, {"counters": self.counts(), "shown": sorted(shown)})


class _Counted(NamedTuple):
    counters: dict[str, float]
    shown: set[str]


def _read(path: Path) -> _Counted | None:
    """What `MediaLedger.write` wrote; None for a file that is not there or of somebody else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _Counted(dict(content["counters"]), set(content["shown"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        logger.warning("%s is left out of the counters: %r", path, error)
        return None


def counters_of(folder: Path) -> dict[str, int]:
    """The counters that the stages of a run have left in its folder, together.

    A video that several have shown is one; decoded and encoded are those of the last process of
    each stage.
    """
    files = sorted([*folder.glob("media*.json"), *folder.glob(f"*/{MEDIA_FILE}")])
    found = [counted for path in files if (counted := _read(path)) is not None]
    shown = set[str]().union(*(counted.shown for counted in found))
    totals: dict[str, int] = {"video/distinct": 0, "video/decoded": 0, "video/encoded": 0}
    for counted in found:
        for name, n in counted.counters.items():
            totals[name] = totals.get(name, 0) + int(n)
    for kind in {name.partition("/")[0] for name in totals}:
        totals[f"{kind}/distinct"] = sum(key.startswith(f"{kind} ") for key in shown)
    return totals
