"""Prints what a run on the film did: `summarise.py config=FILE key=value ...`, as the run had them.

Frames and tokens come from the data layer, seconds and memory from the run's metrics.jsonl.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from verl.config import PPOConfig, parse_cli
from verl.data.dataset import PromptDataset
from verl.models.loader import load_adapter, load_tokenizer
from verl.trainer.media_ledger import counters_of
from verl.trainer.summary import hardware, versions

MEMORY = {
    "memory/host_peak_gib": "peak memory of a worker",
    "memory/device_peak_gib": "peak memory of a GPU",
}


def read_steps(path: Path) -> list[dict[str, float]]:
    """Metrics of the training steps; validation before the first step is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [row["metrics"] for row in map(json.loads, lines) if "perf/step_s" in row["metrics"]]


def describe_input(config: PPOConfig) -> list[tuple[str, str]]:
    """What one prompt holds."""
    model = config.worker.actor.model
    sample = PromptDataset(config.data, load_tokenizer(model), load_adapter(model)).sample(0)
    film, tokens = sample.media[0], len(sample.prompt_ids)
    steps, rows, columns = film.grid_thw
    first, last = film.frame_times[0], film.frame_times[-1]
    return [
        ("film", film.ref.path),
        ("frames", f"{len(film.frame_times)}, from {first:.1f} s to {last:.1f} s"),
        ("patch grid", f"{steps} x {rows} x {columns} (time x height x width)"),
        ("tokens of the first prompt", f"{tokens:,}, of which {film.n_tokens:,} are visual"),
    ]


def describe_run(steps: list[dict[str, float]]) -> list[tuple[str, str]]:
    """What the steps took and gave."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for metrics in steps:
        for name, value in metrics.items():
            if name.startswith("timing_s/"):
                seconds[name.removeprefix("timing_s/")].append(value)
    tokens = fmean(m["prompt_length/mean"] for m in steps)
    rows = [("steps", str(len(steps))), ("tokens a prompt, mean", f"{tokens:,.0f}")]
    for phase, values in seconds.items():
        listed = ", ".join(f"{v:.2f}" for v in values)
        rows.append((f"seconds, {phase}", f"{sum(values):.2f} ({listed})"))
    rows.append(("seconds, all steps", f"{sum(m['perf/step_s'] for m in steps):.2f}"))
    for name, label in MEMORY.items():
        if name in steps[-1]:
            rows.append((label, f"{max(m[name] for m in steps):.2f} GiB"))
    rewards = ", ".join(f"{m['reward/overall']:.3f}" for m in steps)
    return rows + [("mean reward a step", rewards)]


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Keeps the figures beside the run."""
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line entry."""
    config = parse_cli(sys.argv[1:], PPOConfig, "examples/real_film/summarise.py")
    path = config.trainer.resolved_output_dir / "metrics.jsonl"
    if not path.exists():
        raise SystemExit(f"real_film: {path} is missing; run bash examples/real_film.sh first")
    steps = read_steps(path)
    counters = counters_of(path.parent)
    rows = describe_input(config) + describe_run(steps)
    rows += [(f"{name.replace('/', 's ')}", str(n)) for name, n in counters.items()]
    summary = {"counters": counters, "steps": steps, "versions": versions(), "hardware": hardware()}
    write_summary(path.parent.parent / "summary.json", summary)
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"  {label:<{width}}  {value}" for label, value in rows))


if __name__ == "__main__":
    main()
