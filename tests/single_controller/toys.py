"""Workers for the tests: each method does one thing that a group has to cope with."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from verl.protocol import DataProto
from verl.single_controller.decorator import Dispatch, dispatch
from verl.single_controller.worker import Worker


class BadClip(Exception):
    """Takes two arguments, which default pickling of exceptions does not restore."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class NotAnException(BaseException):
    """Like torch's CheckpointException."""


class ToyWorker(Worker):
    """Adds its rank to things, or fails."""

    def __init__(self, offset: int = 0, fail_on: int | None = None, **place: object) -> None:
        super().__init__(**place)  # type: ignore[arg-type]
        self._offset = offset
        if fail_on == self.rank:
            raise ValueError("no such model")

    @dispatch(Dispatch.ALL)
    def sum_of_ranks(self, offset: int = 0) -> float:
        total = torch.tensor(float(self.rank + offset + self._offset))
        dist.all_reduce(total)
        return total.item()

    @dispatch(Dispatch.ALL)
    def about(self) -> dict[str, object]:
        return {
            "dp_rank": self.dp_rank,
            "dp_size": self.dp_size,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "extra": os.environ.get("TOY_VARIABLE"),
            "group": dist.get_world_size(),
        }

    @dispatch(Dispatch.DP)
    def label(self, batch: DataProto, prefix: str, suffix: str = "") -> DataProto:
        names = [f"{prefix}{uid}@{self.rank}{suffix}" for uid in batch["uid"]]
        return DataProto({"name": names, "x": batch["x"]}, batch.meta)

    @dispatch(Dispatch.DP)
    def count(self, batch: DataProto) -> int:
        return len(batch)

    @dispatch(Dispatch.ALL)
    def samples_of(self, batch: DataProto) -> list[str]:
        return batch["uid"]

    @dispatch(Dispatch.ALL)
    def wait_for_others(self, absent: int, how: str) -> None:
        """All but one rank block in a collective; that one hangs, raises or dies."""
        if self.rank != absent:
            dist.all_reduce(torch.zeros(1))
            return
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            sys.exit(3)
        if how == "value":
            raise ValueError("reward is nan")
        if how == "clip":
            raise BadClip("a.mp4", "no frames")
        if how == "base":
            raise NotAnException("shard 3 is damaged")
        logging.getLogger("toy").info("rank %d hangs", self.rank)
        time.sleep(3600)

    def not_marked(self) -> None:
        """Must not be callable through the group."""
