"""Whether the media files that rows name are there, asked before anything is started.

A glance at the directory entry of each file, in threads, and nothing of its content: what is wrong
inside of a file is found when its row comes up.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from verl.data.dataset import RowDataset, bad_media
from verl.data.media_files import BadMedia, check_regular
from verl.data.prompts import MediaSlot
from verl.data.rows import BadSample, Row
from verl.data.sources import DataError
from verl.utils.progress import Progress

logger = logging.getLogger(__name__)

N_THREADS = 32
"""Network disks answer slowly, and many questions at once."""
PART = 64
"""Files that a thread looks at in one go."""
SHOWN = 10
QUIET_S = 2.0
Named = tuple[RowDataset[Any], Row, MediaSlot]
"""A file as a row of a data set names it."""
KeyT = TypeVar("KeyT", bound=Hashable)


def check_media_files(datasets: Sequence[RowDataset[Any]]) -> None:
    """Applies `data.on_bad_sample` to every row that names a file which cannot be opened.

    Raises DataError: with `error` for all such rows of all data sets together, with `skip` when
    they are more than `data.max_bad_fraction` of a data set. A file that is gone but known to the
    index of media measured before is none of them: its frames or embeddings may be stored.
    """
    named = [place for dataset in datasets for place in _named(dataset)]
    found = _faults(named)
    bad = [(dataset, fault) for dataset in datasets for fault in found.get(id(dataset), ())]
    refused = [fault for dataset, fault in bad if not dataset.skips_bad_rows]
    if refused:
        raise DataError(_all_of(refused))
    for dataset in datasets:
        dataset.leave_out(found.get(id(dataset), ()))


def _named(dataset: RowDataset[Any]) -> Iterator[Named]:
    for index, row in enumerate(dataset.rows):
        if not dataset.is_quarantined(index):
            yield from ((dataset, row, slot) for slot in dataset.slots(row))


def _faults(named: Sequence[Named]) -> dict[int, list[BadSample]]:
    """The first fault of each row, by the identity of its data set, in order of rows."""
    on_disk = _ask({_file(place): place for place in named}, _look)
    gone = [place for place in named if _is_missing(on_disk[_file(place)])]
    in_index = _ask({_seen(place): place for place in gone}, _look_up)
    faults: dict[tuple[int, str], BadSample] = {}
    for place in named:
        fault = in_index.get(_seen(place), on_disk[_file(place)])
        if fault is not None:
            dataset, row, slot = place
            faults.setdefault((id(dataset), row.uid), bad_media(row, fault, slot.kind))
    by_dataset: dict[int, list[BadSample]] = {}
    for (dataset_id, _), fault in faults.items():
        by_dataset.setdefault(dataset_id, []).append(fault)
    return by_dataset


def _file(place: Named) -> Hashable:
    dataset, row, slot = place
    return slot.kind, slot.path, str(dataset.probe.root_of(row, slot.kind))


def _seen(place: Named) -> Hashable:
    """A file and how it is looked at."""
    return id(place[0]), place[2].segment, _file(place)


def _look(place: Named) -> BadMedia | None:
    dataset, row, slot = place
    try:
        check_regular(dataset.probe.locate(row, slot))
    except BadMedia as error:
        return error
    return None


def _is_missing(fault: BadMedia | None) -> bool:
    """Gone, and perhaps known to the index."""
    return fault is not None and fault.reason == "missing"


def _look_up(place: Named) -> BadMedia | None:
    dataset, row, slot = place
    try:
        dataset.probe.measure(row, slot)
    except BadMedia as error:
        return error
    return None


def _ask(
    places: Mapping[KeyT, Named], question: Callable[[Named], BadMedia | None]
) -> dict[KeyT, BadMedia | None]:
    """The answer for each place, many at a time; says what is done when that takes long."""

    def ask(part: Sequence[Named]) -> list[BadMedia | None]:
        return [question(place) for place in part]

    asked = list(places.values())
    parts = [asked[i : i + PART] for i in range(0, len(asked), PART)]
    answers: list[BadMedia | None] = []
    pool = ThreadPoolExecutor(N_THREADS)
    try:
        with _announced(len(asked)), Progress(len(asked), "looking for media files") as shown:
            for part in pool.map(ask, parts):
                answers += part
                shown.advance(len(part))
    finally:
        pool.shutdown(cancel_futures=True)  # a signal does not wait for all other files
    return dict(zip(places, answers, strict=True))


@contextmanager
def _announced(n_files: int) -> Iterator[None]:
    text = "looking whether the %d media files that rows name are there (not into them)"
    timer = threading.Timer(QUIET_S, logger.info, (text, n_files))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _all_of(bad: Sequence[BadSample]) -> str:
    """All bad rows in one message; rows that are read more than once stand there once."""
    texts = list(dict.fromkeys(map(str, bad)))
    remedy = "leave such rows out with data.on_bad_sample=skip"
    if len(texts) == 1:
        return f"{texts[0]}; repair the row, or {remedy}"
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    listed = "".join(f"\n  {text}" for text in [*texts[:SHOWN], *more])
    return f"{len(texts)} rows cannot be used; repair them, or {remedy}:{listed}"
