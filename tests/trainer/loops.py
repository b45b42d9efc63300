"""A training loop whose model is one number: everything of a run but Ray, torch and a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verl.config import DataConfig, TrainerConfig
from verl.data.dataset import RowDataset
from verl.data.loader import PromptLoader
from verl.data.rows import BadSample
from verl.trainer import launch
from verl.trainer.checkpoints import Checkpoints
from verl.trainer.loop import LoopParts, TrainingLoop
from verl.trainer.media_ledger import MediaLedger
from verl.utils.exits import advising

N_ROWS, BATCH = 5, 2
MACHINE = ("timing_s/", "memory/", "perf/")


class Killed(BaseException):
    """Stands for SIGKILL at a certain moment."""


class Numbers(RowDataset[Any]):
    """Rows whose sample is their number; those in `bad` are too long."""

    bad: frozenset[int] = frozenset()

    def sample(self, index: int) -> Any:
        if index in self.bad:
            raise BadSample("prompt_too_long", self.rows[index], "9 tokens")
        return SimpleNamespace(uid=self.rows[index].uid, media=(), number=index)


class OneNumber:
    """A worker group whose weights are one number."""

    def __init__(self) -> None:
        self.weight = 1
        self.loads = 0

    def train(self, numbers: list[int]) -> None:
        for number in numbers:
            self.weight = (31 * self.weight + number) % 1_000_003

    def memory(self) -> list[dict[str, float]]:
        return [{"host_peak_gib": 1.0}, {"host_peak_gib": 2.0}]

    def save_shards(self, folder: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / "weight.json").write_text(json.dumps(self.weight))

    def save_assets(self, folder: str) -> None:
        Path(folder).mkdir()

    def load_shards(self, folder: str) -> None:
        self.loads += 1
        self.weight = json.loads((Path(folder) / "weight.json").read_text())


class CountingLoop(TrainingLoop[Any]):
    """Each step adds the numbers of its batch; `moments` are called by name on the way."""

    def __init__(self, *args: Any, moments: Callable[[str, CountingLoop], None]) -> None:
        super().__init__(*args)
        self._moment = moments

    def validate_if_due(self) -> None:
        self._moment("validate", self)
        super().validate_if_due()

    def fit(self) -> None:
        for samples in self.remaining_steps():
            self._moment("work", self)
            with self.updating():
                self.workers.train([s.number for s in samples])
            self.metrics["weight"] = float(self.workers.weight)
            self.validate_if_due()
            self.measure(n_tokens=10)
            self._moment("save", self)
            self.save_if_due()
            self._moment("log", self)
            self.log()
            self._moment("next", self)

    def validate(self) -> dict[str, float]:
        self.tracker.log_generations([{"response": str(self.workers.weight)}], self.step)
        return {"val/rows/accuracy": float(self.workers.weight)}


def run(
    folder: Path,
    *,
    moments: Callable[[str, CountingLoop], None] = lambda name, loop: None,
    bad: tuple[int, ...] = (),
    **settings: Any,
) -> CountingLoop:
    """One process of a run in `folder`, from what an earlier one left there to its end."""
    file = folder / "rows.jsonl"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"problem": f"p{i}", "answer": "a"} for i in range(N_ROWS)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = TrainerConfig(
        **{"total_epochs": 3, "val_freq": 2, "save_freq": 2, "logger": ["file"]} | settings,
        save_checkpoint_path=str(folder / "out"),
    )
    data = DataConfig(train_files=[str(file)], max_bad_fraction=1.0, num_workers=0)
    rows = Numbers(data, data.train_files, lambda row: ("problem",))
    rows.bad = frozenset(bad)
    loader = PromptLoader(rows, BATCH, shuffle=True, seed=1, num_workers=0)
    config = {"trainer": {"max_steps": trainer.max_steps}, "data": {"seed": 1}}
    checkpoints = Checkpoints(trainer, config)
    with (
        advising(checkpoints.how_to_go_on),
        launch.tracker_for(trainer, config, checkpoints.last_step) as tracker,
    ):
        parts = LoopParts(OneNumber(), loader, {}, tracker, checkpoints, no_media(loader))
        if trainer.val_only:
            parts.loader = None
        loop = CountingLoop(
            trainer, parts, launch.total_steps(trainer, len(loader)), moments=moments
        )
        loop.resume()
        loop.run()
    return loop


def no_media(loader: PromptLoader[Any]) -> MediaLedger:
    """Counts of a run of text alone."""
    workers = SimpleNamespace(media_counts=lambda: [{}], feature_name=lambda: [None])
    cache: Any = SimpleNamespace(decoded=Counter())
    return MediaLedger(cache, [loader], workers)


def logged(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines of a file of a run, without what belongs to the machine."""
    lines = [json.loads(line) for line in (out / name).read_text().splitlines()]
    for line in lines:
        metrics = line.get("metrics", {})
        for key in [k for k in metrics if k.startswith(MACHINE)]:
            del metrics[key]
    return lines
