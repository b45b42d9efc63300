"""Gathers what the stages of the SmolLM2 example left: `python3 summarize.py OUT --seed N`.

Writes `eval_base.json` and `eval_rl.json` from the trainer's first and last validation,
`seconds.json` and `run.json`, of which `verl.trainer.report` makes `summary.json` and
`report.html`; and the learning curve `curve.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from verl.trainer.report import report_of_run
from verl.trainer.report_charts import Point, read_metrics
from verl.trainer.validation import evaluation_record

NOTES = [
    "The model is SmolLM2-135M-Instruct, published with weights of four bits.",
    "The problems are those of ASDiv whose answer is a whole number; one passage in five, with all "
    "of its questions, is held out.",
    "Answers are greedy, and every model sees the same prompt: four worked examples, then the "
    "problem. Accuracy counts the answer alone.",
    "base is the trainer's own validation before the first step, rl that after the last, whatever "
    "the curve says; merged is the exported folder, loaded and evaluated anew.",
]
SMOOTH = 5
"""Steps of the running mean over training samples, of which each step has other problems."""


def draw(metrics: Mapping[str, Sequence[Point]], path: Path, seed: int) -> None:
    """Accuracy by step, in percent: of training samples, and of held-out problems."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, points in metrics.items():
        steps, values = [step for step, _ in points], [100 * value for _, value in points]
        if name == "reward/accuracy":
            parts = (values[max(0, i - SMOOTH) : i] for i in range(1, len(values) + 1))
            label = f"training samples, mean of {SMOOTH} steps"
            axes.plot(steps, [fmean(part) for part in parts], color="0.6", label=label)
        elif fnmatchcase(name, "val/*/accuracy"):
            axes.plot(steps, values, "o-", label="held-out problems, greedy")
    axes.set(xlabel="GRPO step", ylabel="right answers, %", ylim=(0, None))
    axes.set_title(f"SmolLM2-135M-Instruct on ASDiv, seed {seed}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    metrics = read_metrics(args.out / "rl" / "metrics.jsonl")
    steps = int(metrics["reward/accuracy"][-1][0])
    for name, step in (("base", 0), ("rl", steps)):
        lines = (args.out / "rl" / "validation" / f"test_step_{step}.jsonl").read_text("utf-8")
        answers = [json.loads(line) for line in lines.splitlines()]
        _write(args.out / f"eval_{name}.json", evaluation_record(name, answers, temperature=0.0))
    kept = (p for p in (args.out / "seconds").iterdir() if p.suffix != ".part")
    files = sorted(kept, key=lambda p: p.stat().st_mtime)
    _write(args.out / "seconds.json", {p.name: int(p.read_text()) for p in files})
    facts = {
        "title": "GRPO of SmolLM2-135M-Instruct on arithmetic word problems",
        "seed": args.seed,
        "steps": steps,
        "notes": NOTES,
    }
    _write(args.out / "run.json", facts)
    page = report_of_run(args.out)
    draw(metrics, args.out / "curve.png", args.seed)
    accuracy = json.loads((args.out / "summary.json").read_text(encoding="utf-8"))["accuracy"]
    for name in ("base", "rl", "merged"):
        print(f"  {name:7} {100 * accuracy[name]['overall']:5.1f}%  of {accuracy[name]['n']}")
    print(f"report: {page}")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
