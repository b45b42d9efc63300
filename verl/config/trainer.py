"""The `trainer.*` section: length of the run, devices, validation, checkpoints, logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from verl.config.base import Count, CountOrOff, NonNegativeInt

LoggerName = Literal["console", "file", "tensorboard", "wandb", "mlflow", "swanlab"]
Device = Literal["auto", "cuda", "cpu"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long to train, on what, and what to write down."""

    total_epochs: Count = 15
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Steps to train; null means as many as `trainer.total_epochs` gives. When both would end the
    run, the smaller one does."""
    project_name: str = "long_rl"
    """Name of the project, in paths and loggers."""
    experiment_name: str = "demo"
    """Name of this run, in paths and loggers."""
    logger: list[LoggerName] = field(default_factory=lambda: ["console", "file"])
    """Where metrics go: any of console, file, tensorboard, wandb, mlflow, swanlab. The last three
    are extras: `pip install 'long-rl[mlflow]'`."""
    nnodes: Count = 1
    """Machines that take part."""
    n_gpus_per_node: Count = 8
    """Worker processes a machine: one a GPU, or just processes when `trainer.device=cpu`."""
    device: Device = "auto"
    """auto: CUDA when there is a GPU, otherwise the CPU."""
    val_freq: CountOrOff = -1
    """Validate every so many steps; -1 means only before and after, as the next keys say."""
    val_before_train: bool = True
    """Validate once before the first step."""
    val_only: bool = False
    """Validate and stop; nothing is trained. Results go to `<output_dir>/val_only_step_N/`, where N
    is the step of the weights, 0 without a checkpoint: those of the run itself stay as they are."""
    val_generations_to_log: NonNegativeInt = 3
    """Validation responses that are written to the loggers in full."""
    save_freq: CountOrOff = -1
    """Write a checkpoint every so many steps; -1 means at the end only. The end is always saved,
    and so is the last whole step when an error of the data or of the reward function ends a run
    while the workers are still at that step: not in an update or the validation after it."""
    save_limit: CountOrOff = -1
    """Checkpoints that are kept, the newest ones; -1 means all."""
    save_checkpoint_path: str | None = None
    """Folder of the checkpoints; null means `checkpoints/<project_name>/<experiment_name>`. One run
    at a time may train in it: `run.lock` names its process."""
    load_checkpoint_path: str | None = None
    """Checkpoint to start from: a folder `global_step_N`. When it is missing the run stops. Once
    the run has saved checkpoints of its own, the same command goes on from the newest of them;
    `trainer.find_last_checkpoint=false` starts from the given one each time."""
    find_last_checkpoint: bool = True
    """Go on from the newest checkpoint in the checkpoint folder when there is one; beside
    `trainer.load_checkpoint_path`, from the newest that was made since the run started there."""
    output_dir: str | None = None
    """Folder of metrics, generations and reports; null means the checkpoint folder. When a run ends
    in an error, `error.txt` in it holds the traceback."""

    @property
    def world_size(self) -> int:
        """Worker processes over all machines."""
        return self.nnodes * self.n_gpus_per_node

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the checkpoints, with the default filled in."""
        default = Path("checkpoints") / self.project_name / self.experiment_name
        return Path(self.save_checkpoint_path) if self.save_checkpoint_path else default

    @property
    def resolved_output_dir(self) -> Path:
        """Folder of metrics and reports, with the default filled in."""
        return Path(self.output_dir) if self.output_dir else self.checkpoint_dir
