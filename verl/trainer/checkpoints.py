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
FREE_TO_CHANGE = ("trainer.", "data.num_workers", "data.prefetch_gib", "data.cache_", "data.val_")


class Checkpoints:
    """The checkpoints of one run, as its configuration places them."""

    def __init__(self, trainer: TrainerConfig, config: Mapping[str, Any]) -> None:
        self._root = trainer.checkpoint_dir
        self._limit = trainer.save_limit
        self._explicit = (
            Path(trainer.load_checkpoint_path) if trainer.load_checkpoint_path else None
        )
        self._automatic = trainer.find_last_checkpoint
        self._config = config
        self.last: Path | None = None
        """The checkpoint saved or resumed last."""

    def save(self, step: int, workers: Any, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint of all workers and of the driver; valid all at once or not at all."""
        with CheckpointDir(self._root, step) as checkpoint:
            actor = checkpoint.path / ROLE
            workers.save_shards(str(actor))
            workers.save_assets(str(actor / ASSETS))
            self.last = checkpoint.commit(state, config=self._config, keep=self._limit)
        logger.info("checkpoint written: %s", self.last)

    def resume(self, workers: Any) -> dict[str, Any] | None:
        """Restores the workers from the last checkpoint; returns the driver's state, if any."""
        path = resolve_checkpoint(self._root, self._explicit, self._automatic)
        if path is None:
            logger.info("starting from scratch: no checkpoint in %s", self._root)
            return None
        state, saved = read_driver_state(path)
        changed = [
            line
            for line in changed_keys(saved, self._config)
            if not line.startswith(FREE_TO_CHANGE)
        ]
        if changed:
            logger.warning(
                "settings differ from those of %s, so the run will not equal an uninterrupted "
                "one: %s",
                path,
                "; ".join(changed),
            )
        workers.load_shards(str(path / ROLE))
        self.last = path
        logger.info("RESUMED from %s after step %d", path, state["step"])
        return state
