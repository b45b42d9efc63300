"""Batches of samples in a seeded order that a killed run resumes exactly.

The order is a function of (seed, epoch) alone, and the state is how many rows of it were used. So
worker counts are free to change, and no library's iterator state is stored.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic

from verl.data.dataset import RowDataset, SampleT, bad_media
from verl.data.media import MediaCache, MediaItem
from verl.data.media_files import BadMedia
from verl.data.rows import BadSample
from verl.data.sources import DataError

logger = logging.getLogger(__name__)


class PromptLoader(Generic[SampleT]):
    """Yields lists of samples, decoding their media ahead in threads.

    Decoded frames go to the media cache, not into memory. What the batch handed out last shows is
    held there until the next batch is asked for or the iteration is closed: no process of this
    machine evicts what a running step needs.

    A row that cannot be used never enters a batch: with `data.on_bad_sample=skip` the next row of
    the order takes its place. Iterating yields what is left of the current epoch and moves on to
    the next, so that a resumed run continues with

        while loader.epoch < total_epochs:
            for samples in loader: ...

    also when it stopped at the very end of an epoch.
    """

    def __init__(
        self,
        dataset: RowDataset[SampleT],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        media_cache: MediaCache | None = None,
        prefetch_bytes: int = 1 << 30,
        num_workers: int = 2,
        drop_last: bool = True,
        group_by_video: int = 1,
    ) -> None:
        """
        Args:
            batch_size: samples a batch; -1 for all rows at once.
            media_cache: where media are decoded to ahead of use; None decodes nothing.
            prefetch_bytes: most bytes of decoded frames ahead of the batch in use, found in the
                cache or decoded. A single row that is larger still goes through, alone.
            num_workers: threads that read ahead; 0 reads when a batch is asked for.
            drop_last: leave out the rows that fill no batch (training); False yields them as a
                smaller last batch (validation).
            group_by_video: most rows about the same media that follow each other.
        """
        self._batch_size = len(dataset) if batch_size == -1 else batch_size
        if self._batch_size < 1:
            raise DataError(f"batch size {batch_size}: must be at least 1, or -1 for all rows")
        if drop_last and self._batch_size > len(dataset):
            raise DataError(
                f"a batch of {batch_size} is more than the {len(dataset)} rows of "
                f"{', '.join(dataset.files)}; set data.rollout_batch_size (for SFT: "
                f"batch.global_batch_size) to at most {len(dataset)}"
            )
        self.dataset = dataset
        self.epoch = 0
        """The epoch that is being read, counted from 0."""
        self.cursor = 0
        """Rows of this epoch's order that were used or left out."""
        self._shuffle = shuffle
        self._seed = seed
        self._cache = media_cache
        self._prefetch_bytes = prefetch_bytes
        self._num_workers = num_workers
        self._drop_last = drop_last
        self._group_by_video = group_by_video
        self._n_left: int | None = None
        self._is_encoded: Callable[[MediaItem], bool] = lambda _: False
        self._must_be_encoded = False
        self.shown: set[str] = set()
        """Kind and key of the media read so far, none without a cache."""

    def skip_encoded(self, is_encoded: Callable[[MediaItem], bool], *, must_be: bool) -> None:
        """From now on decodes only media whose embeddings are not there.

        With `must_be`, a row with media that are not encoded cannot be used.
        """
        self._is_encoded, self._must_be_encoded = is_encoded, must_be

    def __len__(self) -> int:
        """Most batches that an epoch can have; rows left out make it fewer.

        It does not shrink when rows are found unusable, so that schedules made from it are the
        same in a resumed run.
        """
        n_rows = len(self.dataset)
        return n_rows // self._batch_size if self._drop_last else -(-n_rows // self._batch_size)

    def order(self, epoch: int) -> list[int]:
        """Row numbers in the order of an epoch, sorted by a hash of (seed, epoch, row)."""
        numbers = list(range(len(self.dataset)))
        if self._shuffle:
            start = f"{self._seed}:{epoch}:".encode()
            numbers.sort(key=lambda i: hashlib.blake2b(start + b"%d" % i, digest_size=16).digest())
        return numbers if self._group_by_video == 1 else self._neighbours(numbers)

    def _neighbours(self, numbers: Sequence[int]) -> list[int]:
        """Rows about the same media behind the first of them, `group_by_video` at most."""
        chunks: list[list[int]] = []
        open_chunk: dict[tuple[Any, ...], list[int]] = {}
        for i in numbers:
            row = self.dataset.rows[i]
            shown = (row.images, row.videos, row.segments, row.folder)
            chunk = open_chunk.get(shown)
            if chunk is None or len(chunk) == self._group_by_video:
                chunks.append([i])
                if row.images or row.videos:
                    open_chunk[shown] = chunks[-1]
            else:
                chunk.append(i)
        return [i for chunk in chunks for i in chunk]

    def __iter__(self) -> Iterator[list[SampleT]]:
        epoch, first = self.epoch, self.cursor
        order = self.order(epoch)
        n_batches, batch = 0, []
        with _ReadAhead(self, order[first:], self._rows_wanted(len(order) - first)) as samples:
            for n_read, sample in enumerate(samples, start=first + 1):
                if sample is None:
                    continue
                batch.append(sample)
                if len(batch) == self._batch_size:
                    # The state moves before the batch is handed out: it is saved after its use.
                    self._move_to(n_read, len(order) - n_read)
                    with self._held(batch):
                        yield batch
                    n_batches, batch = n_batches + 1, []
                    if self.epoch != epoch:
                        return
        if first == 0 and n_batches == 0 and (self._drop_last or not batch):
            raise DataError(
                f"{', '.join(self.dataset.files)}: {len(batch)} of {len(order)} rows can be used "
                f"and a batch needs {self._batch_size}; left out: {self.dataset.summary()}"
            )
        self._finish_epoch(n_unused=len(batch) if self._drop_last else 0)
        if batch and not self._drop_last:
            with self._held(batch):
                yield batch

    def batches(self, total_epochs: int, most: int | None = None) -> Iterator[list[SampleT]]:
        """The batches of all epochs that are left, from wherever the state stands.

        Of `most` batches at most; nothing is read ahead of the last of them.
        """
        self._n_left = most
        while self.epoch < total_epochs and self._n_left != 0:
            for batch in self:
                if self._n_left is not None:
                    self._n_left -= 1
                yield batch
                if self._n_left == 0:
                    return

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands after the batch that was yielded last; plain JSON types."""
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "group_by_video": self._group_by_video,
            "rows": self.dataset.fingerprint,
            "quarantine": self.dataset.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batch that was yielded last when the state was taken.

        Raises what `check_state` raises.
        """
        self.check_state(state)
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.dataset.load_state_dict(state["quarantine"])

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises DataError when what makes the order of rows differs: it would be another."""
        here = self.state_dict()
        settings = {
            "seed": "data.seed",
            "shuffle": "data.shuffle",
            "group_by_video": "data.group_by_video",
            "rows": "data.train_files",
        }
        state = {"group_by_video": 1, **state}  # checkpoints from before the key
        for name, setting in settings.items():
            if state[name] != here[name]:
                raise DataError(
                    f"{setting} changed since the checkpoint ({name} {state[name]}, now "
                    f"{here[name]}), so the order of rows cannot be resumed; restore it, or start "
                    "anew with another trainer.save_checkpoint_path"
                )

    def _rows_wanted(self, n_rows: int) -> int:
        """Rows that the batches to come are made of, if all of them can be used."""
        n_batches = (
            n_rows // self._batch_size if self._drop_last else -(-n_rows // self._batch_size)
        )
        if self._n_left is not None:
            n_batches = min(n_batches, self._n_left)
        return n_batches * self._batch_size

    def _held(self, batch: Sequence[SampleT]) -> AbstractContextManager[None]:
        if self._cache is None:
            return nullcontext()
        return self._cache.hold(item.ref.key for sample in batch for item in sample.media)

    def _move_to(self, cursor: int, n_left: int) -> None:
        self.cursor = cursor
        # An epoch that cannot fill another batch is over now, so that a run resumed from here
        # begins the next epoch and does not stop with nothing to do.
        if n_left < (self._batch_size if self._drop_last else 1):
            self._finish_epoch(n_unused=n_left)

    def _finish_epoch(self, n_unused: int) -> None:
        left_out = self.dataset.summary() if self.dataset.quarantine else ""
        if n_unused or left_out:
            logger.info(
                "epoch %d: %d rows fill no batch of %d and are not used in it; left out so far: %s",
                *(self.epoch, n_unused, self._batch_size, left_out or "none"),
            )
        self.epoch, self.cursor = self.epoch + 1, 0


class _ReadAhead(Generic[SampleT]):
    """Samples of some rows in order, None for a row left out, built ahead of the consumer.

    Produces in `num_workers` threads, up to the byte budget; consumes in row order, which gives
    bytes back; waits for the row that is needed next. Leaving the context ends the threads.
    """

    def __init__(self, loader: PromptLoader[SampleT], rows: Sequence[int], n_wanted: int) -> None:
        """Reads the first `n_wanted` rows, and another one for each that cannot be used."""
        self._dataset = loader.dataset
        self._loader = loader
        self._cache = loader._cache
        self._rows = rows
        self._n_wanted = n_wanted
        self._budget = _ByteBudget(loader._prefetch_bytes)
        self._pool = ThreadPoolExecutor(loader._num_workers) if loader._num_workers else None
        self._window = loader._batch_size + 2 * loader._num_workers if self._pool else 1

    def __enter__(self) -> Iterator[SampleT | None]:
        return self._samples()

    def __exit__(self, *_: object) -> None:
        self._budget.close()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _samples(self) -> Iterator[SampleT | None]:
        pending: deque[Callable[[], SampleT | None]] = deque()
        n_submitted = 0
        for turn in range(len(self._rows)):
            wanted = min(self._n_wanted, len(self._rows))
            while n_submitted < wanted and len(pending) < self._window:
                pending.append(self._submit(n_submitted))
                n_submitted += 1
            if not pending:
                return
            sample = None
            try:
                sample = pending.popleft()()
            except BadSample as bad:
                self._dataset.reject(bad)
            self._budget.release(turn)
            self._n_wanted += sample is None
            yield sample

    def _submit(self, turn: int) -> Callable[[], SampleT | None]:
        if self._pool is None:
            return lambda: self._read(turn)
        return self._pool.submit(self._read, turn).result

    def _read(self, turn: int) -> SampleT | None:
        index = self._rows[turn]
        sample, n_bytes, absent = None, 0, []
        try:
            # A row left out once stays out without another try: a resumed run that has only the
            # stored quarantine must come to the same order.
            if not self._dataset.is_quarantined(index):
                sample = self._dataset.sample(index)
                absent = [m for m in sample.media if not self._loader._is_encoded(m)]
                n_bytes = sum(map(decoded_bytes, absent)) if self._cache else 0
        finally:
            self._budget.acquire(turn, n_bytes)
        if absent and self._loader._must_be_encoded:
            raise bad_media(self._dataset.rows[index], _not_encoded(absent[0]))
        if self._cache and sample is not None:
            for item in sample.media:
                if item in absent:
                    self._decode(self._cache, index, item)
                self._loader.shown.add(f"{item.ref.kind} {item.ref.key}")
        return sample

    def _decode(self, cache: MediaCache, index: int, item: MediaItem) -> None:
        try:
            cache.get(item.ref)
        except BadMedia as error:
            raise bad_media(self._dataset.rows[index], error) from error


def _not_encoded(item: MediaItem) -> BadMedia:
    detail = (
        f"cached_embeds_dir has no sound embeddings of it as this run reads it: grid "
        f"{item.grid_thw}, this model's tower, the dtype that the actor computes in"
    )
    return BadMedia("not_encoded", item.ref.path, detail)


class _ByteBudget:
    """Grants bytes to turns strictly in order, so that the row needed next never starves."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[int, int] = {}
        self._next_turn = 0
        self._closed = False
        self._changed = threading.Condition()

    def acquire(self, turn: int, n_bytes: int) -> None:
        """Waits until all earlier turns have theirs and the bytes fit, or nothing is held."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (turn == self._next_turn and self._fits(n_bytes))
            )
            if self._closed:
                raise _Closed
            self._next_turn += 1
            self._held[turn] = n_bytes
            self._changed.notify_all()

    def release(self, turn: int) -> None:
        """Gives back what a turn holds."""
        with self._changed:
            del self._held[turn]
            self._changed.notify_all()

    def close(self) -> None:
        """Wakes and ends all that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, n_bytes: int) -> bool:
        held = sum(self._held.values())
        return held == 0 or held + n_bytes <= self._limit


class _Closed(Exception):
    """The consumer is gone; a thread that still waits for its turn ends."""


def decoded_bytes(item: MediaItem) -> int:
    """Bytes of the resized uint8 frames of one piece of media, known from its grid."""
    rule = item.ref.resize
    t, h, w = item.grid_thw
    return 3 * t * rule.temporal_patch_size * h * w * rule.patch_size**2
