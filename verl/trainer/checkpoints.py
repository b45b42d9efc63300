"""Saving and resuming a run: workers write their shards, the driver makes the checkpoint valid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from verl.config import OptimConfig, TrainerConfig
from verl.config.render import NEUTRAL
from verl.data.loader import PromptLoader
from verl.utils.checkpoint import (
    ASSETS,
    CheckpointDir,
    changed_keys,
    origin_of,
    read_driver_state,
    resolve_checkpoint,
)
from verl.utils.folder_lock import FolderLock, lock_folder
from verl.utils.manifest import read_manifest

logger = logging.getLogger(__name__)
ROLE = "actor"
# A run may be prolonged, moved or watched differently without becoming another run. Where its
# length shapes the learning rate, `warn_of_bent_schedule` speaks up.
FREE_TO_CHANGE = (
    "trainer.*",
    "data.num_workers",
    "data.prefetch_gib",
    "data.cache_*",
    "data.decode_*",
    "data.media_fingerprint",
    "data.max_bad_fraction",
    "data.val_*",
    "worker.rollout.val_override_config*",
    "*rollout.num_chunk_seq",
    "*cached_embeds_dir",
    "worker.reward.num_cpus",
    "worker.reward.timeout_s",
)
"""Patterns of settings that change no number."""


class Checkpoints:
    """The checkpoints of one run, as its configuration places them."""

    def __init__(self, trainer: TrainerConfig, config: Mapping[str, Any]) -> None:
        """Looks for the one to start from, before anything is started.

        A run that trains locks the folder; one that only validates starts from exactly what it is
        told and changes nothing. Raises CheckpointError when another run holds the folder, when
        the checkpoint must not be used, or none of several can be.
        """
        self._root = trainer.checkpoint_dir
        self._lock: FolderLock | None = None if trainer.val_only else lock_folder(self._root)
        self._limit = trainer.save_limit
        self._trainer = trainer
        self._config = config
        explicit = Path(trainer.load_checkpoint_path) if trainer.load_checkpoint_path else None
        automatic = trainer.find_last_checkpoint and not (trainer.val_only and explicit)
        self._start = resolve_checkpoint(
            self._root, explicit, automatic, repair=not trainer.val_only
        )
        self._origin = _origin(self._start, explicit)
        self._state, saved = read_driver_state(self._start) if self._start else (None, {})
        self._saved: Mapping[str, Any] = saved
        self.last_step: int = self._state["step"] if self._state else 0
        """Step of the checkpoint that was found or saved last; 0 for none."""
        self._has_own = self._start is not None and self._is_own(self._start)
        if self._start is not None:
            _warn_of_changes(self._start, saved, config)

    def check_order(self, loader: PromptLoader[Any]) -> None:
        """Raises DataError where the rows of the checkpoint's run came in another order.

        Before anything is started: `resume` would find it out when the workers are there.
        """
        if self._state is not None:
            loader.check_state(self._state["loader"])

    def warn_of_bent_schedule(
        self, optim: OptimConfig, section: str, steps_of: Callable[[TrainerConfig], int]
    ) -> None:
        """Warns when the run has become longer or shorter and its learning rate depends on that.

        `section` is where `optim` stands in the config; `steps_of` counts the steps of a run.
        """
        if self._start is None:
            return
        before = self._saved.get("trainer", {})
        old = {k: before.get(k, getattr(self._trainer, k)) for k in ("max_steps", "total_epochs")}
        changed = [
            f"trainer.{k}: {v!r} -> {getattr(self._trainer, k)!r}"
            for k, v in old.items()
            if v != getattr(self._trainer, k)
        ]
        was, now = steps_of(replace(self._trainer, **old)), steps_of(self._trainer)
        reason = _dependence(optim, section, self.last_step, max(was, now))
        if changed and was != now and reason:
            logger.warning(
                "%s changes the run from %d to %d steps, and the learning rate with it: %s. From "
                "step %d on it follows a run of %d steps, which the steps before did not; for an "
                "unbent schedule go back to the old value, or start anew in another folder",
                ", ".join(changed), was, now, reason, self.last_step + 1, now,
            )  # fmt: skip

    def save(self, step: int, workers: Any, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint of all workers and of the driver; valid all at once or not at all."""
        with CheckpointDir(self._root, step) as checkpoint:
            actor = checkpoint.path / ROLE
            workers.save_shards(str(actor))
            workers.save_assets(str(actor / ASSETS))
            path = checkpoint.commit(
                state, config=self._config, keep=self._limit, origin=self._origin
            )
        self.last_step, self._has_own = step, True
        logger.info("checkpoint written: %s", path)

    def how_to_go_on(self) -> str:
        """What the same command would do now; empty for a run that only validates."""
        trainer = self._trainer
        if trainer.val_only:
            return ""
        given = trainer.load_checkpoint_path
        anew = f"starts from {given}" if given else "starts from scratch"
        if not self._has_own:
            return f"No checkpoint was written yet: the same command {anew}."
        newest = f"goes on from global_step_{self.last_step}"
        if trainer.find_last_checkpoint:
            return f"The same command {newest}."
        return (
            f"The same command {anew}, because of trainer.find_last_checkpoint=false; with true it "
            f"{newest}."
        )

    def _is_own(self, checkpoint: Path) -> bool:
        return checkpoint.resolve().parent == self._root.resolve()

    def resume(self, workers: Any) -> dict[str, Any] | None:
        """Restores the workers from the checkpoint found; returns the driver's state, if any."""
        if self._start is None or self._state is None:
            logger.info("starting from scratch: no checkpoint in %s", self._root)
            return None
        workers.load_shards(str(self._start / ROLE))
        logger.info("RESUMED from %s after step %d", self._start, self.last_step)
        return self._state


def _origin(start: Path | None, explicit: Path | None) -> str | None:
    """Which checkpoint `trainer.load_checkpoint_path` named when the run was started, if any did.

    A run that goes on from one of its own has the origin that it had.
    """
    if start is None:
        return None
    given = explicit is not None and start in (explicit, explicit.parent)
    return origin_of(start) if given else read_manifest(start).get("origin")


def _dependence(optim: OptimConfig, section: str, step: int, steps: int) -> str:
    """How the learning rate after `step` depends on the length of the run; empty if it does not."""
    if optim.warmup_style != "constant":
        return f"{section}.warmup_style={optim.warmup_style} falls until the last step"
    if optim.lr_warmup_steps is None and step < optim.lr_warmup_ratio * steps:
        return f"{section}.lr_warmup_ratio={optim.lr_warmup_ratio:g} is a share of all steps"
    return ""


def _warn_of_changes(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Names settings that differ; those of memory and speed change numbers by rounding alone."""
    changed = [c for c in changed_keys(saved, current) if not _matches(c, FREE_TO_CHANGE)]
    rounding = [c for c in changed if _matches(c, NEUTRAL)]
    if others := [c for c in changed if c not in rounding]:
        logger.warning(
            "settings differ from those of %s, so the run will not equal an uninterrupted one: %s",
            path, "; ".join(others),
        )  # fmt: skip
    if rounding:
        logger.info(
            "settings differ from those of %s that change results by rounding at most: %s",
            path, "; ".join(rounding),
        )  # fmt: skip


def _matches(change: str, patterns: Sequence[str]) -> bool:
    """Whether the key of `key: old -> new` is named by a pattern."""
    key = change.partition(":")[0]
    return any(fnmatchcase(key, pattern) for pattern in patterns)
