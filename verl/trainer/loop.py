"""What RL and SFT have in common: steps that are left, logging, checkpoints, resuming."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic

from verl.config import TrainerConfig
from verl.data.dataset import SampleT
from verl.data.loader import PromptLoader
from verl.data.media_files import BadMedia
from verl.data.rows import BadSample
from verl.data.sources import DataError
from verl.trainer.checkpoints import Checkpoints
from verl.trainer.media_ledger import MEDIA_FILE, MediaLedger
from verl.trainer.timing import PhaseTimer
from verl.utils.log_files import strict
from verl.utils.logger import Tracker
from verl.workers.reward import RewardError

logger = logging.getLogger(__name__)
SECONDS_TO_KEEP = 600.0
"""Longest time that saving may take when a run ends in an error."""
USERS_ERRORS = (DataError, BadSample, BadMedia, RewardError)
"""What a user's data or reward function does wrong: the workers are as well as before."""
NOT_WORK = ("validation", "checkpoint")
"""Phases that are no part of a training step."""


@dataclass
class LoopParts(Generic[SampleT]):
    """What a trainer drives."""

    workers: Any
    loader: PromptLoader[SampleT] | None
    """Batches to train on; None where a run only validates."""
    validation: dict[str, PromptLoader[SampleT]]
    tracker: Tracker
    checkpoints: Checkpoints
    media: MediaLedger


class TrainingLoop(Generic[SampleT]):
    """Counts steps, and writes down what each of them gave. Subclasses say what a step is.

    A step ends with `measure`, `save_if_due`, `log`, in this order. The checkpoint holds the step's
    numbers, so that a run killed between the last two logs them when it resumes.
    """

    def __init__(
        self, settings: TrainerConfig, parts: LoopParts[SampleT], total_steps: int
    ) -> None:
        self.settings = settings
        self.workers = parts.workers
        self.loader = parts.loader
        self.validation = parts.validation
        self.tracker = parts.tracker
        self.checkpoints = parts.checkpoints
        self.media = parts.media
        self.total_steps = total_steps
        self.step = 0
        """The step that is running or was done last, counted from 1."""
        self.phase = PhaseTimer()
        self.metrics: dict[str, float] = {}
        """Numbers of the running step, until they are logged."""
        self._complete: dict[str, Any] | None = None
        """`state_dict` after the last whole step, as long as the workers are at that step."""

    def validate(self) -> dict[str, float]:
        """Numbers of the current weights on the validation files."""
        raise NotImplementedError

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the driver beside step, loader and metrics; plain JSON."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes back what `own_state` gave."""

    def remaining_steps(self) -> Iterator[list[SampleT]]:
        """Samples of each step that is left; moves `self.step`."""
        assert self.loader is not None, "a run that only validates has no steps"
        batches = self.loader.batches(self.settings.total_epochs, self.total_steps - self.step)
        while self.step < self.total_steps:
            self._complete = self.state_dict()
            self.phase.title = f"step {self.step + 1} of {self.total_steps}"
            with self.phase("data"):
                samples = next(batches, None)
            if samples is None:
                break
            self.step += 1
            yield samples
        self.finish()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The phase in which the workers leave the last whole step behind."""
        self._complete = None
        with self.phase("update"):
            yield

    def finish(self) -> None:
        """After the last step: nothing, unless the rows ended early or there was none to do."""
        if self.checkpoints.last_step == self.step:
            logger.info(
                "all is done: step %d was the last of %d; to go on, raise trainer.max_steps or "
                "trainer.total_epochs; for a new run set %s (or remove %s)",
                self.step, max(self.step, self.total_steps), self._name_of_run(),
                self.settings.checkpoint_dir,
            )  # fmt: skip
            return
        logger.warning(
            "the run ends after step %d instead of %d: rows that were left out made the epochs "
            "shorter", self.step, self.total_steps,
        )  # fmt: skip
        self.metrics |= self.validate()
        self.save()
        self.log()

    def _name_of_run(self) -> str:
        """The setting that gives a run its folder."""
        placed = self.settings.save_checkpoint_path
        return "trainer.save_checkpoint_path" if placed else "trainer.experiment_name"

    def is_due(self, freq: int) -> bool:
        """True every `freq` steps and at the last one."""
        return self.step == self.total_steps or (freq > 0 and self.step % freq == 0)

    def validate_if_due(self) -> None:
        """Validates every `trainer.val_freq` steps and after the last one."""
        if self.is_due(self.settings.val_freq):
            self.metrics |= self.validate()

    def measure(self, n_tokens: int) -> None:
        """Adds time, memory and speed of the step to its numbers; `n_tokens` went through it."""
        seconds = self.phase.take()
        work = sum(s for name, s in seconds.items() if name not in NOT_WORK)
        memory = self.workers.memory()
        self.metrics |= {f"timing_s/{name}": s for name, s in seconds.items()}
        self.metrics |= {f"memory/{k}": max(m[k] for m in memory) for k in memory[0]}
        self.metrics |= {"perf/step_s": work, "perf/tokens_per_second": n_tokens / max(work, 1e-9)}
        self.metrics |= self.media.counts()
        self.metrics["epoch"] = float(self.loader.epoch if self.loader else 0)

    def save_if_due(self) -> None:
        """Saves every `trainer.save_freq` steps and after the last one."""
        if self.is_due(self.settings.save_freq):
            self.save()

    def save(self) -> None:
        """Writes a checkpoint of the workers and of the driver."""
        with self.phase("checkpoint"):
            self.checkpoints.save(self.step, self.workers, self.state_dict())

    def log(self) -> None:
        """Sends the step's numbers to the loggers and forgets them."""
        self.metrics |= {f"timing_s/{name}": s for name, s in self.phase.take().items()}
        self.tracker.log(self.metrics, self.step)
        self.metrics = {}

    def log_validation(self) -> None:
        """Validates the current weights and logs the result under the current step."""
        self.metrics |= self.validate()
        self.log()

    def state_dict(self) -> dict[str, Any]:
        """The driver's own state; weights and optimizer are the workers'."""
        assert self.loader is not None
        loop = {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "metrics": strict(self.metrics),
        }
        return loop | self.own_state()

    def resume(self) -> None:
        """Continues from the checkpoint that was found, if there is one, and opens the loggers."""
        state = self.checkpoints.resume(self.workers)
        if state is not None:
            self.step = state["step"]
            self.load_own_state(state)
            if self.loader is not None:
                self.loader.load_state_dict(state["loader"])
        if self.settings.val_only:
            # Not a continuation: nothing of the run that trained these weights may be cut off.
            self.tracker.resume(0)
            return
        last = state.get("metrics") if state else None
        self.tracker.resume(self.step, total_steps=self.total_steps, last_metrics=last)

    def run(self) -> None:
        """Validates and trains as the settings say."""
        if self.settings.val_only or (self.settings.val_before_train and self.step == 0):
            self.phase.title = f"step {self.step}"
            self.log_validation()
        if not self.settings.val_only:
            try:
                self.fit()
            except USERS_ERRORS:
                self.keep_steps()
                raise
        self.media.write(self.tracker.output_dir / MEDIA_FILE)

    def keep_steps(self) -> None:
        """Saves the last whole step of a run that ends in an error, if that is still possible.

        It is when the workers are still at that step: not after an error in an update, or in what
        follows it. In a thread, since nothing may keep a run from ending.
        """
        state = self._complete
        if state is None or state["step"] <= self.checkpoints.last_step:
            return
        logger.info("the run ends in an error: saving step %d, the last whole one", state["step"])
        thread = threading.Thread(target=self._try_to_save, args=(state,), daemon=True)
        thread.start()
        thread.join(SECONDS_TO_KEEP)
        if thread.is_alive():
            logger.warning("no checkpoint after %.0f s: given up", SECONDS_TO_KEEP)

    def _try_to_save(self, state: dict[str, Any]) -> None:
        try:
            self.checkpoints.save(state["step"], self.workers, state)
        except Exception as error:  # The error that ends the run is the one to be told.
            logger.warning("no checkpoint, the steps since the last one are lost: %s", error)

    def fit(self) -> None:
        """Trains until `total_steps`."""
        raise NotImplementedError
