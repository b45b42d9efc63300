"""Where metrics go: console, tensorboard, wandb, mlflow, swanlab. Packages are imported on use."""

from __future__ import annotations

import importlib
import logging
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Protocol

from rich.console import Console
from rich.text import Text

logger = logging.getLogger(__name__)
Metrics = Mapping[str, float]
Rows = Sequence[Mapping[str, Any]]
GIVE_UP_AFTER = 10
"""Failures in a row after which a remote logger is left alone."""


@dataclass(frozen=True)
class Run:
    """What a logger is told about the run. `config` holds no secrets any more."""

    project: str
    experiment: str
    config: Mapping[str, Any]
    output_dir: Path
    last_step: int | None
    """Step after which a resumed run goes on; None for a new one."""
    total_steps: int | None = None
    """Last step of the run, where it is known."""

    def run_id(self, backend: str) -> str:
        """Id under which a remote logger knows this run; kept in the output folder for resuming."""
        path = self.output_dir / f"{backend}_run_id"
        if self.last_step is None or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:12])
        return path.read_text().strip()

    def keep_run_id(self, backend: str, value: str) -> None:
        """Keeps an id that the service itself chose."""
        (self.output_dir / f"{backend}_run_id").write_text(value)


class Backend(Protocol):
    """One place metrics go to. `open` is called once, before anything else."""

    def open(self, run: Run) -> None: ...
    def log(self, metrics: Metrics, step: int) -> None: ...
    def log_generations(self, rows: Rows, step: int) -> None: ...
    def finish(self, status: str) -> None: ...


class ConsoleBackend:
    """One short line a step on stdout, coloured on a terminal, through logging elsewhere."""

    LABELS: ClassVar[dict[str, str]] = {
        "reward/overall": "reward",
        "reward/accuracy": "accuracy",
        "train/loss": "loss",
        "response_length/mean": "length",
        "actor/entropy": "entropy",
        "kl/ref": "KL",
        "actor/grad_norm": "grad",
        "train/grad_norm": "grad",
        "actor/lr": "lr",
        "train/lr": "lr",
        "mismatch/mean_abs": "mismatch",
    }
    """The few numbers a line shows and how it calls them; the file has all of them."""
    SAMPLE = ("question", "response", "extracted", "answer", "reward")
    """What a line shows of a sample, where it has them."""
    VALIDATION = re.compile(r"val/(?P<file>[^/]+)/(?P<what>accuracy|loss)")

    def open(self, run: Run) -> None:
        self._console = Console(soft_wrap=True)
        self._total = run.total_steps
        self._first: int | None = None
        self._started = 0.0
        self._show(f"{run.project}/{run.experiment}: results go to {run.output_dir}")

    def log(self, metrics: Metrics, step: int) -> None:
        parts = [f"{name} {_number(value)}" for name, value in self.chosen(metrics).items()]
        if "perf/step_s" in metrics:
            parts.append(f"{metrics['perf/step_s']:.1f} s/step")
        if left := self._time_left(step):
            parts.append(f"{left} left")
        of = f"/{self._total}" if self._total else ""
        self._show("  ".join(parts), title=f"step {step}{of}")

    def chosen(self, metrics: Metrics) -> dict[str, float]:
        """What a line shows, by label; the first few where no name is known."""
        found = {label: metrics[n] for n, label in self.LABELS.items() if n in metrics}
        for name, value in metrics.items():
            if match := self.VALIDATION.fullmatch(name):
                found[f"{match['file']} {match['what']}"] = value
        return found or dict(list(metrics.items())[:6])

    def _time_left(self, step: int) -> str:
        """`1:02:03` by the pace since the first line of this process, validations included."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._started = step, now
        if not self._total or step <= self._first or step >= self._total:
            return ""
        pace = (now - self._started) / (step - self._first)
        return str(timedelta(seconds=round(pace * (self._total - step))))

    def log_generations(self, rows: Rows, step: int) -> None:
        for row in rows:
            shown = {k: row[k] for k in self.SAMPLE if k in row} or row
            text = "  ".join(f"{k}={_short(v)}" for k, v in shown.items())
            self._show(text, title=f"step {step} sample")

    def finish(self, status: str) -> None:
        self._show(f"run {status}")

    def _show(self, text: str, title: str = "") -> None:
        if sys.stdout.isatty():
            self._console.print(Text.assemble((f"{title} ", "bold green") if title else "", text))
        else:
            logger.info("%s", f"{title}: {text}" if title else text)


class TensorBoardBackend:
    """Event files in `<output_dir>/tensorboard`; steps after the resumed one are purged."""

    def open(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if run.last_step is None else run.last_step + 1
        self._writer = SummaryWriter(str(run.output_dir / "tensorboard"), purge_step=purge)
        self._writer.add_text("config", f"```\n{run.config}\n```")

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_generations(self, rows: Rows, step: int) -> None:
        self._writer.add_text("generations", markdown_table(rows), step)

    def finish(self, status: str) -> None:
        self._writer.close()


class WandbBackend:
    """Weights & Biases; `WANDB_MODE=offline` works. A resumed run goes on under the same id."""

    def open(self, run: Run) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=run.project, name=run.experiment, config=dict(run.config),
            id=run.run_id("wandb"), resume="allow", dir=str(run.output_dir),
            settings=wandb.Settings(console="off"),
        )  # fmt: skip
        # Its own counter must only grow, which a resumed run would violate; ours is a metric.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Metrics, step: int) -> None:
        self._run.log({**metrics, "step": step})

    def log_generations(self, rows: Rows, step: int) -> None:
        columns: list[Any] = list(dict.fromkeys(key for row in rows for key in row))
        data: list[Any] = [[_cell(row.get(c)) for c in columns] for row in rows]
        table = self._wandb.Table(columns=columns, data=data)
        self._run.log({"generations": table, "step": step})

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


class MlflowBackend:
    """MLflow, at `MLFLOW_TRACKING_URI` or its default. A resumed run goes on under the same id.

    The run is named in every call: MLflow's active run is one a thread, and we log from another
    thread than the one that opens.
    """

    def open(self, run: Run) -> None:
        import mlflow  # type: ignore[import-not-found]

        self._metric = mlflow.entities.Metric
        experiment = mlflow.set_experiment(run.project)
        self._client = mlflow.MlflowClient()
        path = run.output_dir / "mlflow_run_id"
        if run.last_step is not None and path.exists():
            self._run_id = path.read_text().strip()
            self._client.update_run(self._run_id, status="RUNNING")
            return
        made = self._client.create_run(experiment.experiment_id, run_name=run.experiment)
        self._run_id = made.info.run_id
        run.keep_run_id("mlflow", self._run_id)
        self._client.log_dict(self._run_id, dict(run.config), "config.json")

    def log(self, metrics: Metrics, step: int) -> None:
        clean = {re.sub(r"[^\w./ -]", "_", name): value for name, value in metrics.items()}
        now_ms = int(time.time() * 1000)
        points = [self._metric(name, value, now_ms, step) for name, value in clean.items()]
        self._client.log_batch(self._run_id, points)

    def log_generations(self, rows: Rows, step: int) -> None:
        table = markdown_table(rows)
        self._client.log_text(self._run_id, table, f"generations/step_{step}.md")

    def finish(self, status: str) -> None:
        names = {"finished": "FINISHED", "stopped": "KILLED"}
        self._client.set_terminated(self._run_id, names.get(status, "FAILED"))


class SwanlabBackend:
    """SwanLab; `SWANLAB_MODE=offline` works without an account."""

    def open(self, run: Run) -> None:
        import swanlab  # type: ignore[import-not-found]

        self._swanlab = swanlab
        swanlab.init(
            project=run.project, experiment_name=run.experiment, config=dict(run.config),
            logdir=str(run.output_dir / "swanlab"), id=run.run_id("swanlab"), resume="allow",
        )  # fmt: skip

    def log(self, metrics: Metrics, step: int) -> None:
        self._swanlab.log(dict(metrics), step=step)

    def log_generations(self, rows: Rows, step: int) -> None:
        texts = [self._swanlab.Text(markdown_table([row])) for row in rows]
        self._swanlab.log({"generations": texts}, step=step)

    def finish(self, status: str) -> None:
        self._swanlab.finish()


class Background:
    """Runs a backend in a thread, so that a slow or dead server costs training nothing.

    The first failure is a warning; after `GIVE_UP_AFTER` in a row the backend is left alone. What
    it misses still stands in metrics.jsonl. `opens_in_thread` is for a backend that would take
    over the main thread's signals.
    """

    def __init__(
        self, name: str, backend: Backend, *, capacity: int = 1000, opens_in_thread: bool = False
    ) -> None:
        self._name = name
        self._backend = backend
        self._opens_in_thread = opens_in_thread
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._failures = 0
        self._warned = False
        self._thread = threading.Thread(target=self._work, name=f"log-{name}", daemon=True)

    def open(self, run: Run) -> None:
        self._run = run
        if not self._opens_in_thread:
            self._open()
        self._thread.start()

    def log(self, metrics: Metrics, step: int) -> None:
        self._put(lambda: self._backend.log(dict(metrics), step))

    def log_generations(self, rows: Rows, step: int) -> None:
        self._put(lambda: self._backend.log_generations(list(rows), step))

    def finish(self, status: str, timeout_s: float = 60.0) -> None:
        self._put(lambda: self._backend.finish(status))
        self._put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._warn(f"did not finish within {timeout_s:.0f} s")

    def _put(self, task: Callable[[], None] | None) -> None:
        try:
            self._queue.put_nowait(task)
        except queue.Full:
            self._warn("is too slow; entries are dropped")

    def _open(self) -> None:
        self._attempt(lambda: self._backend.open(self._run))
        if self._failures:
            self._failures = GIVE_UP_AFTER

    def _work(self) -> None:
        if self._opens_in_thread:
            self._open()
        while (task := self._queue.get()) is not None:
            if self._failures < GIVE_UP_AFTER:
                self._attempt(task)

    def _attempt(self, task: Callable[[], None]) -> None:
        try:
            task()
            self._failures = 0
        except Exception as error:  # A tracker of whatever kind must never stop training.
            self._failures += 1
            self._warn(f"failed: {type(error).__name__}: {error}")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "logger %s %s. Training goes on; metrics.jsonl is complete. This is said once",
                self._name, what,
            )  # fmt: skip


BACKENDS: dict[str, Callable[[], Backend]] = {
    "console": ConsoleBackend,
    "tensorboard": TensorBoardBackend,
    "wandb": lambda: Background("wandb", WandbBackend()),
    "mlflow": lambda: Background("mlflow", MlflowBackend()),
    "swanlab": lambda: Background("swanlab", SwanlabBackend(), opens_in_thread=True),
}
_PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
}


def check_installed(name: str) -> None:
    """Raises ImportError with the command to type when the logger's package is missing."""
    if name not in _PACKAGES:
        return
    try:
        importlib.import_module(name)
    except ImportError as error:
        extra = f"'long-rl[{name}]'" if name != "tensorboard" else "tensorboard"
        raise ImportError(
            f"trainer.logger asks for {name}, but the package cannot be imported ({error}); "
            f"run: pip install {extra}, or take {name} out of trainer.logger"
        ) from error


def markdown_table(rows: Rows) -> str:
    """Rows as a Markdown table, one column a key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["|".join(columns), "|".join("---" for _ in columns)]
    for row in rows:
        cells = [str(row.get(c, "")).replace("|", "\\|").replace("\n", "<br>") for c in columns]
        lines.append("|".join(cells))
    return "\n".join(f"|{line}|" for line in lines)


def _cell(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _short(value: Any, most: int = 200) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
