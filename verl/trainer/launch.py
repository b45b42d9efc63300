"""What the RL, SFT and evaluation entry points share: devices, Ray, loaders."""

from __future__ import annotations

import importlib.util
import logging
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl.config import DataConfig, ModelConfig, PPOConfig, RolloutConfig, TrainerConfig
from verl.config.rollout_checks import engine_problems, renormalising
from verl.config.schema import with_values
from verl.data.dataset import RowDataset, SampleT
from verl.data.loader import PromptLoader
from verl.data.media import MediaCache
from verl.data.media_files import BadMedia
from verl.data.presence import check_media_files
from verl.data.rows import BadSample
from verl.data.sources import DataError
from verl.models.adapter import ModelError
from verl.utils.device_memory import smallest_gpu_bytes
from verl.utils.exits import Explained
from verl.utils.logger import Tracker
from verl.utils.manifest import CheckpointError
from verl.utils.processes import ray_session
from verl.utils.redact import redact_text
from verl.utils.torch_functional import compiler_missing
from verl.workers.media_stores import GIB
from verl.workers.reward import RewardError

logger = logging.getLogger(__name__)
ERROR_FILE = "error.txt"


class StartError(Explained, ValueError):
    """A setting that does not fit this machine or this data; the message says what to type."""


WRONG_INPUT = (
    StartError, DataError, BadSample, BadMedia, ModelError, CheckpointError, RewardError,
)  # fmt: skip


@contextmanager
def starting() -> Iterator[None]:
    """Wrong input found in this block ends the run with exit code 2: repeating it cannot help."""
    try:
        yield
    except WRONG_INPUT as error:
        error.exit_code = 2
        raise


def resolve_device(wanted: str, n_devices: int) -> str:
    """`cuda` or `cpu`; raises StartError when the GPUs that were asked for are not there."""
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and available == 0):
        return "cpu"
    if available < n_devices:
        fewer = f"set trainer.n_gpus_per_node={available} or " if available else ""
        raise StartError(
            f"trainer.n_gpus_per_node={n_devices}, but this machine has {available} GPUs; "
            f"{fewer}set trainer.device=cpu"
        )
    return "cuda"


def resolve_rollout(rollout: RolloutConfig, device: str, section: str) -> RolloutConfig:
    """The settings with the name of an engine in the place of auto; the log says why it is that.

    vLLM's log-probs are of the words that top_p and top_k leave, which training cannot use.
    """
    if rollout.name != "auto":
        return rollout
    left_out = ", ".join(f"{k}={v:g}" for k, v in renormalising(rollout, section).items())
    reasons = {
        "this run has no GPU": device == "cpu",
        "vLLM is not installed": importlib.util.find_spec("vllm") is None,
        f"{left_out} leaves words out": bool(left_out),
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    name = "hf" if why else "vllm"
    logger.info("%sname=auto: %s, since %s", section, name, why or "vLLM is installed")
    return replace(rollout, name=name)


def check_engine(
    rollout: RolloutConfig, model: ModelConfig, data: DataConfig, world_size: int, device: str,
    section: str,
) -> None:  # fmt: skip
    """Raises StartError for settings that the engine which auto stands for does not take."""
    problems = [p.text for p in engine_problems(rollout, model, data, world_size, section)]
    if rollout.name == "vllm" and device == "cpu" and model.compile_pointwise == "on":
        problems.append(
            f"compile_pointwise=on with {section}name=vllm on CPUs: vLLM's start takes 18 s longer "
            "while torch may compile, so it is turned off in the workers; use compile_pointwise="
            f"auto, or {section}name=hf"
        )
    if problems:
        raise StartError("; ".join(problems))


def resolve_correction(config: PPOConfig) -> PPOConfig:
    """The run with importance weights, or none, in the place of auto, for the engine it names."""
    key = "algorithm.rollout_correction.rollout_is"
    if config.algorithm.rollout_correction.rollout_is != "auto":
        return config
    level = "token" if config.worker.rollout.name == "vllm" else None
    return with_values(config, {key: level})


def gpu_bytes(config: PPOConfig, device: str) -> int | None:
    """Memory of a GPU of this machine; None on CPUs, and where it is not known and not needed.

    Raises StartError where `ulysses_size=auto` needs it.
    """
    if device == "cpu":
        return None
    found = smallest_gpu_bytes()
    if found is None and config.worker.actor.ulysses_size == "auto":
        raise StartError(
            "worker.actor.ulysses_size=auto: nvidia-smi, which says how much memory a GPU has, is "
            "not there or does not say; give a number"
        )
    return found


def check_attention(model: ModelConfig, device: str, section: str) -> None:
    """Raises StartError for a GPU's attention on a CPU that `trainer.device=auto` has chosen."""
    kernel = model.attn_implementation
    if kernel not in ("auto", "sdpa") and device == "cpu":
        raise StartError(
            f"{section}.attn_implementation={kernel} needs CUDA, but trainer.device=auto found no "
            f"GPU on this machine; use {section}.attn_implementation=auto or sdpa"
        )


def check_compiler(model: ModelConfig, device: str, section: str) -> None:
    """Raises StartError where compiling on CPUs was asked for and this machine has no compiler.

    What workers on GPUs need is known where they run.
    """
    import torch

    if model.compile_pointwise != "on" or device != "cpu":
        return
    if missing := compiler_missing(torch.device(device)):
        raise StartError(
            f"{section}.compile_pointwise=on: {missing} on this machine; install one, or use "
            f"{section}.compile_pointwise=auto"
        )


def ray_for(n_workers: int, device: str) -> AbstractContextManager[Any]:
    """A Ray session with room for the workers."""
    name = "1 worker" if n_workers == 1 else f"{n_workers} workers"
    logger.info("starting %s on %s; this takes 10 to 30 seconds", name, device)
    return ray_session(num_cpus=n_workers + 1, device=device, num_gpus=n_workers)


@contextmanager
def tracker_for(trainer: TrainerConfig, config: dict[str, Any], step: int) -> Iterator[Tracker]:
    """Loggers that are told how the run ended; `step` is the one that the run goes on after.

    A signal stops a run, an error makes it fail.

    The traceback of an error that ends it goes to `error.txt` beside the metrics.
    """
    folder = trainer.resolved_output_dir
    if trainer.val_only:
        # The folder of the weights' own run belongs to that run.
        folder = folder / f"val_only_step_{step}"
    tracker = Tracker(trainer.logger, trainer.project_name, trainer.experiment_name, config, folder)
    status = "failed"
    try:
        yield tracker
        status = "finished"
        (folder / ERROR_FILE).unlink(missing_ok=True)  # of an earlier attempt
    except KeyboardInterrupt:
        status = "stopped"
        raise
    except Exception as error:
        _keep_traceback(error, folder / ERROR_FILE)
        raise
    finally:
        tracker.finish(status)


def _keep_traceback(error: Exception, path: Path) -> None:
    """Writes down where an error came from: one that is explained is shown without."""
    text = redact_text("".join(traceback.format_exception(error)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as trouble:  # a full disk may be the very error; it must not be hidden
        logger.warning("the traceback cannot be kept in %s: %s", path, trouble)
        return
    error.add_note(f"The traceback is in {path}.")


def total_steps(trainer: TrainerConfig, batches_per_epoch: int) -> int:
    """Steps of the whole run: `max_steps`, or the epochs if they are shorter."""
    by_epochs = trainer.total_epochs * batches_per_epoch
    return by_epochs if trainer.max_steps is None else min(by_epochs, trainer.max_steps)


def warn_of_short_epochs(trainer: TrainerConfig, batches_per_epoch: int) -> None:
    """Says when the epochs end before `trainer.max_steps`."""
    steps = total_steps(trainer, batches_per_epoch)
    if trainer.max_steps is not None and steps < trainer.max_steps:
        logger.warning(
            "trainer.max_steps=%d, but trainer.total_epochs=%d gives %d steps; for more, raise "
            "trainer.total_epochs", trainer.max_steps, trainer.total_epochs, steps,
        )  # fmt: skip


def train_loader(
    dataset: RowDataset[SampleT], data: DataConfig, cache: MediaCache, batch_size: int, setting: str
) -> PromptLoader[SampleT]:
    """Shuffled, resumable batches of exactly `batch_size`, media decoded ahead.

    `setting` is the key that says `batch_size`. Raises StartError when there are too few rows.
    """
    n_rows, files = len(dataset), ", ".join(dataset.files)
    logger.info("training on %d rows of %s", n_rows, files)
    if batch_size > n_rows:
        raise StartError(
            f"{setting}={batch_size}, but {files} holds {n_rows} rows and a batch needs as many as "
            f"it says; set {setting} to at most {n_rows}, or add data"
        )
    return _loader(
        dataset, data, cache, batch_size,
        shuffle=data.shuffle, drop_last=True, group_by_video=data.group_by_video,
    )  # fmt: skip


def check_media(loaders: Iterable[PromptLoader[Any] | None]) -> None:
    """Looks for the media files of all rows; see `check_media_files`."""
    check_media_files([loader.dataset for loader in loaders if loader is not None])


def validation_loader(
    dataset: RowDataset[SampleT], data: DataConfig, cache: MediaCache | None
) -> PromptLoader[SampleT]:
    """Every row once, in order, in batches of `data.val_batch_size`; without `cache` unseen."""
    return _loader(dataset, data, cache, data.val_batch_size, shuffle=False, drop_last=False)


def _loader(
    dataset: RowDataset[SampleT],
    data: DataConfig,
    cache: MediaCache | None,
    batch_size: int,
    **order: Any,
) -> PromptLoader[SampleT]:
    return PromptLoader(
        dataset,
        batch_size,
        seed=data.seed,
        media_cache=cache,
        prefetch_bytes=int(data.prefetch_gib * GIB),
        num_workers=data.num_workers,
        **order,
    )
