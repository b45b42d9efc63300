"""Saving and resuming a run: workers write their shards, the driver makes the checkpoint valid."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl.config import TrainerConfig
from verl.utils.checkpoint import (
    ASSETS,
    CheckpointDir,
    changed_keys,
    read_driver_state,
    resolve_checkpoint,
)

logger = logging.getLogger(__name__)
ROLE = "actor"
# A run may be prolonged, moved or watched differently without becoming another run.
FREE_TO_CHANGE = (
    "trainer.",
    "data.num_workers",
    "data.prefetch_gib",
    "data.cache_",
    "data.val_",
    "worker.rollout.val_override_config",
    "worker.reward.num_cpus",
    "worker.reward.timeout_s",
)


class Checkpoints:
    """The checkpoints of one run, as its configuration places them."""

    def __init__(self, trainer: TrainerConfig, config: Mapping[str, Any]) -> None:
        """Looks for the one to start from, before anything is started.

        Raises CheckpointError when it must not be used, or none of several can be.
        """
        self._root = trainer.checkpoint_dir
        self._limit = trainer.save_limit
        self._config = config
        explicit = Path(trainer.load_checkpoint_path) if trainer.load_checkpoint_path else None
        self._start = resolve_checkpoint(self._root, explicit, trainer.find_last_checkpoint)
        self._state, saved = read_driver_state(self._start) if self._start else (None, {})
        self.last_step: int = self._state["step"] if self._state else 0
        """Step of the checkpoint that was found or saved last; 0 for none."""
        if self._start is not None:
            _warn_of_changes(self._start, saved, config)

    def save(self, step: int, workers: Any, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint of all workers and of the driver; valid all at once or not at all."""
        with CheckpointDir(self._root, step) as checkpoint:
            actor = checkpoint.path / ROLE
            workers.save_shards(str(actor))
            workers.save_assets(str(actor / ASSETS))
            path = checkpoint.commit(state, config=self._config, keep=self._limit)
        self.last_step = step
        logger.info("checkpoint written: %s", path)

    def resume(self, workers: Any) -> dict[str, Any] | None:
        """Restores the workers from the checkpoint found; returns the driver's state, if any."""
        if self._start is None or self._state is None:
            logger.info("starting from scratch: no checkpoint in %s", self._root)
            return None
        workers.load_shards(str(self._start / ROLE))
        logger.info("RESUMED from %s after step %d", self._start, self.last_step)
        return self._state


def _warn_of_changes(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    changed = [c for c in changed_keys(saved, current) if not c.startswith(FREE_TO_CHANGE)]
    if changed:
        logger.warning(
            "settings differ from those of %s, so the run will not equal an uninterrupted one: %s",
            path,
            "; ".join(changed),
        )
