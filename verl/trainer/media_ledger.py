"""How many videos a run had to decode and to encode: once each, and not at all when stored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from verl.config import DataConfig
from verl.data.loader import PromptLoader
from verl.data.media import MediaCache, MediaKind
from verl.models.adapter import Adapter
from verl.workers.media_stores import stored_features

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
        if name is None:
            return
        stored = stored_features(name, adapter, data, cached_embeds_dir)
        for loader in self._loaders:
            loader.skip_encoded(stored.has, must_be=cached_embeds_dir is not None)

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
        """Kind and key of everything that was in a batch so far."""
        return set().union(*(loader.shown for loader in self._loaders))

    def write(self, path: Path) -> None:
        """Keeps the counts of this process, and the keys that any process ever wrote here."""
        before = read_keys(path)
        content = {"counters": self.counts(), "shown": sorted(before | self.shown)}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_keys(path: Path) -> set[str]:
    """The keys in a file that `MediaLedger.write` wrote; none where there is no such file."""
    if not path.exists():
        return set()
    return set(json.loads(path.read_text(encoding="utf-8"))["shown"])


def counters_of(folder: Path) -> dict[str, int]:
    """The counters that the stages of a run have left in its folder, together."""
    return added(sorted([*folder.glob("media*.json"), *folder.glob("*/media*.json")]))


def added(paths: Sequence[Path]) -> dict[str, int]:
    """The counters of several runs together; a video that several have shown is one."""
    keys = set().union(*(read_keys(path) for path in paths))
    totals: dict[str, int] = {"video/distinct": 0, "video/decoded": 0, "video/encoded": 0}
    for path in paths:
        for name, n in json.loads(path.read_text(encoding="utf-8"))["counters"].items():
            totals[name] = totals.get(name, 0) + int(n)
    for kind in {name.partition("/")[0] for name in totals}:
        totals[f"{kind}/distinct"] = sum(key.startswith(f"{kind} ") for key in keys)
    return totals
