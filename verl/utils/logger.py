"""Metrics, sample generations, log lines and progress of a run."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from verl.utils.log_backends import BACKENDS, Backend, Run, check_installed
from verl.utils.log_files import JsonLines
from verl.utils.progress import Progress, progress
from verl.utils.redact import redact, redact_text

__all__ = ["Progress", "Tracker", "progress", "setup_logging"]
logger = logging.getLogger(__name__)
LOGGERS = ("console", "file", "tensorboard", "wandb", "mlflow", "swanlab")


class Tracker:
    """Sends metrics and sample generations to every logger that was asked for.

    `file` writes `<output_dir>/metrics.jsonl` ({"step": 3, "metrics": {...}} a line) and
    `generations.jsonl`; it is the source of truth, and its errors are errors. Trouble with wandb,
    mlflow or swanlab is a warning, once. Secrets in `config` are hidden before any logger sees it.

    Call `resume(step)` before the first `log` when the run goes on after `step`, or `resume(0)`
    when it is new. Without the call, the first step that is logged decides.
    """

    def __init__(
        self,
        loggers: Sequence[str],
        project: str,
        experiment: str,
        config: Mapping[str, Any],
        output_dir: Path | str,
    ) -> None:
        for name in loggers:
            if name not in LOGGERS:
                close = difflib.get_close_matches(name, LOGGERS, 1) or ["console"]
                raise ValueError(
                    f"trainer.logger: unknown logger {name!r}; did you mean {close[0]}? "
                    f"Known: {', '.join(LOGGERS)}"
                )
            check_installed(name)
        self.output_dir = Path(output_dir)
        self._names = list(dict.fromkeys(loggers))
        self._project, self._experiment, self._config = project, experiment, redact(dict(config))
        self._metrics = JsonLines(self.output_dir / "metrics.jsonl")
        self._generations = JsonLines(self.output_dir / "generations.jsonl")
        self._backends: list[Backend] = []
        self._is_open = False

    def resume(
        self,
        last_step: int,
        *,
        total_steps: int | None = None,
        last_metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Opens the loggers for a run that goes on after `last_step`; 0 means a new run.

        `total_steps` lets the console tell the time that is left. `last_metrics` are the numbers of
        `last_step`: they are logged now where a kill after the checkpoint came before its line.
        """
        kept = self._open(last_step if last_step > 0 else None, total_steps)
        if last_metrics and "file" in self._names and (kept is None or kept < last_step):
            self.log(last_metrics, last_step)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Records numbers under a step. Steps must not go back."""
        self._open_before(step)
        if "file" in self._names:
            self._metrics.write({"step": step, "metrics": dict(metrics)})
        for backend in self._backends:
            backend.log(metrics, step)

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Records sample responses, one mapping (prompt, response, reward, ...) each."""
        if not rows:
            return
        self._open_before(step)
        if "file" in self._names:
            for row in rows:
                self._generations.write({"step": step, **row})
        for backend in self._backends:
            backend.log_generations(rows, step)

    def finish(self, status: str = "finished") -> None:
        """Flushes and closes all loggers; `status` is "finished", "stopped" or "failed"."""
        for backend in self._backends:
            backend.finish(status)
        self._backends = []

    def _open_before(self, step: int) -> None:
        if not self._is_open:
            self._open(step - 1 if step > 0 else None)

    def _open(self, last_step: int | None, total_steps: int | None = None) -> float | None:
        """Opens everything once; returns the last step that metrics.jsonl has already."""
        if self._is_open:
            return None
        self._is_open = True
        self.output_dir.mkdir(parents=True, exist_ok=True)
        kept = None
        if "file" in self._names:
            kept = self._metrics.begin(last_step)
            self._generations.begin(last_step)
            last_step = last_step if kept is not None else None
        run = Run(
            self._project, self._experiment, self._config, self.output_dir, last_step, total_steps
        )
        self._backends = [BACKENDS[name]() for name in self._names if name != "file"]
        for backend in self._backends:
            backend.open(run)
        return kept


class _Formatter(logging.Formatter):
    """Hides secrets in the finished line, arguments and tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


class _Handler(logging.StreamHandler):
    """Our own handler, so that a second `setup_logging` replaces it and leaves others alone."""

    @property
    def stream(self) -> TextIO:
        """The stderr of the moment: a progress bar puts one in its place that prints above it."""
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None: ...


def setup_logging(rank: int | None = None, role: str = "", level: int = logging.INFO) -> None:
    """Sends log lines to stderr, with role and rank in front where given, and without secrets."""
    who = " ".join(p for p in (role, "" if rank is None else f"rank {rank}") if p)
    handler = _Handler()
    prefix = f"[{who}] " if who else ""
    handler.setFormatter(
        _Formatter(f"%(asctime)s %(levelname)s {prefix}%(name)s: %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h, _Handler)] + [handler]
    root.setLevel(level)
    for chatty in ("httpx", "urllib3", "filelock", "fsspec", "git"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))
