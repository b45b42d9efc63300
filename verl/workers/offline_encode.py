"""Encodes media into a store for later runs: one process with a vision tower of its own.

The parent sends pieces of media through a pipe, and never more than it wants to be in memory.
Threads decode them ahead, the main thread encodes and stores them, and each is answered once. What
is stored is stored whole, so that a process may be killed at any moment.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import torch

from verl.config import ModelConfig
from verl.data.embed_store import EmbedKey, EmbedStore
from verl.data.media import Frames, MediaCache, MediaItem, MediaRef, decode_media
from verl.data.media_files import REMEDIES, BadMedia
from verl.data.preprocess import VisionSpec
from verl.models.adapter import Adapter
from verl.models.fingerprint import tower_fingerprint
from verl.models.loader import load_adapter
from verl.models.tower import load_tower
from verl.models.tower_compile import compile_tower
from verl.utils.exits import Explained, UserError
from verl.utils.logger import setup_logging
from verl.workers.encoder import MediaEncoder, StoredFeatures, WholeModel


@dataclass(frozen=True, kw_only=True)
class OfflineJob:
    """What all processes of one run do; it is pickled."""

    model: ModelConfig
    family: str
    weights: str
    """Name of the tower's weights, from `checkpoint_fingerprint`."""
    dtype: torch.dtype
    vision: VisionSpec
    store_dir: str
    limit_bytes: int
    threads: int
    """Threads that decode ahead, in each process."""
    overwrite: bool

    def key(self, item: MediaItem) -> EmbedKey:
        """The name under which training looks for the embeddings of a piece of media."""
        return EmbedKey(
            media=item.ref.key, family=self.family, weights=self.weights, dtype=self.dtype,
            pixels=self.vision,
        )  # fmt: skip


@dataclass(frozen=True)
class Ready:
    """The tower is loaded."""


@dataclass(frozen=True)
class Fatal:
    """This process cannot work at all."""

    message: str


@dataclass(frozen=True)
class Made:
    """The embeddings of the piece of media with this number are stored."""

    number: int


@dataclass(frozen=True)
class Failed:
    """The piece of media with this number has no embeddings, and why."""

    number: int
    reason: str
    """One of `verl.data.media_files.Reason`, or `encode_error`, `gpu_memory`, `not_stored`."""
    detail: str


Answer = Ready | Fatal | Made | Failed


class DecodedAhead:
    """Frames of the media at hand, in memory, in the place of a cache on disk."""

    def __init__(self) -> None:
        self._frames: dict[str, Frames] = {}

    def decode(self, ref: MediaRef) -> None:
        """Keeps the frames until `drop`. Raises BadMedia."""
        self._frames[ref.key] = decode_media(ref)

    def get(self, ref: MediaRef) -> Frames:
        """Frames that are kept."""
        return self._frames[ref.key]

    def drop(self, ref: MediaRef) -> None:
        """Lets go of the frames, if there are any."""
        self._frames.pop(ref.key, None)


def serve(job: OfflineJob, index: int, device: str, torch_threads: int, pipe: Connection) -> None:
    """Main function of a process. Ends when the parent says so (None), or has died."""
    # Ctrl-C reaches all processes of a terminal; the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    setup_logging(index, "encode")
    torch.set_num_threads(torch_threads)
    try:
        worker = _OfflineEncoder(job, torch.device(device))
    except Exception as error:
        if not isinstance(error, Explained):
            raise
        pipe.send(Fatal(error.user_message))
        return
    pipe.send(Ready())
    worker.work(pipe)


class _OfflineEncoder:
    def __init__(self, job: OfflineJob, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        hf: Any = load_tower(job.model, job.dtype, device)
        adapter = load_adapter(job.model)
        tower = adapter.vision_tower(hf)
        assert tower is not None
        compile_tower(adapter, hf, device, job.model.compile_vision_tower)
        if tower_fingerprint(tower) != job.weights:
            raise UserError(
                f"--model_path {job.model.model_path}: its files changed while this command "
                "started; run it again"
            )
        self._job = job
        self._store = EmbedStore(job.store_dir, job.limit_bytes)
        self._frames = DecodedAhead()
        self._encoder = _media_encoder(hf, adapter, device, self._frames, self._store, job)

    def work(self, pipe: Connection) -> None:
        """Answers every piece of media that comes through the pipe."""
        decoded: queue.Queue[tuple[int, MediaItem, Exception | None] | None] = queue.Queue()
        with ThreadPoolExecutor(self._job.threads, thread_name_prefix="decode") as pool:

            def decode(number: int, item: MediaItem) -> None:
                try:
                    self._frames.decode(item.ref)
                except Exception as error:  # the main thread tells those that it knows
                    decoded.put((number, item, error))
                else:
                    decoded.put((number, item, None))

            def receive() -> None:
                try:
                    while (task := pipe.recv()) is not None:
                        pool.submit(decode, *task)
                except (EOFError, OSError):
                    os._exit(1)  # The parent is gone; what is half done is nobody's.
                decoded.put(None)

            threading.Thread(target=receive, name="receive", daemon=True).start()
            while (next_one := decoded.get()) is not None:
                number, item, error = next_one
                pipe.send(self._answer(number, item, error))
                self._frames.drop(item.ref)

    def _answer(self, number: int, item: MediaItem, error: Exception | None) -> Answer:
        try:
            if error is not None:
                raise error
            self._encode(item)
        except BadMedia as bad:
            return Failed(number, bad.reason, f"{bad.detail}; {REMEDIES[bad.reason]}")
        except MemoryError as full:
            detail = f"the host has too little memory ({full}); give fewer --num_workers"
            return Failed(number, "out_of_memory", detail)
        except torch.OutOfMemoryError as full:
            what = str(full).partition("\n")[0]
            return Failed(number, "gpu_memory", f"{what}; lower --video_max_pixels")
        except (UserError, ValueError) as problem:
            return Failed(number, "encode_error", str(problem))
        key = self._job.key(item)
        if self._store.missing([key]):
            detail = f"{self._store.root} has no room for it; see --cache_gib and the disk's space"
            return Failed(number, "not_stored", detail)
        return Made(number)

    def _encode(self, item: MediaItem) -> None:
        if self._job.overwrite:
            self._store.path_of(self._job.key(item)).unlink(missing_ok=True)
        self._encoder.features([item])


def _media_encoder(
    hf: Any,
    adapter: Adapter,
    device: torch.device,
    frames: DecodedAhead,
    store: EmbedStore,
    job: OfflineJob,
) -> MediaEncoder:
    """The encoder that training uses, so that what is stored is what it would make."""
    assert adapter.vision is not None
    stored = StoredFeatures(
        store=store, family=job.family, weights=job.weights, dtype=job.dtype, pixels=adapter.vision
    )
    # It asks a cache for the frames of a reference, and for nothing else.
    cache = cast(MediaCache, frames)
    return MediaEncoder(WholeModel(hf, adapter, device), cache, stored)
