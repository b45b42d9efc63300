"""A folder as a quickstart run leaves it, made up: what the report and the summary read."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VIDEO = Path(__file__).resolve().parents[1] / "assets" / "bbb_60s.mp4"
KINDS = ("first", "last", "count")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prediction(i: int, correct: bool, **changes: Any) -> dict[str, Any]:
    """A row as evaluation writes it."""
    gold = "ABCD"[i % 4]
    said = gold if correct else "ABCD"[(i + 1) % 4]
    chain = f"<think> 1 red circle top-left 2 blue cross so blue {said} </think>"
    return {
        "uid": f"u{i:03d}",
        "question": f"which event comes {KINDS[i % 3]} ? ({i})",
        "options": ["A:red", "B:blue", "C:green", "D:white"],
        "answer": gold,
        "problem_type": KINDS[i % 3],
        "video": str(VIDEO),
        "response": f" {chain} <answer> {said} </answer>",
        "response_length": 26,
        "finish_reason": "stop",
        "extracted": said,
        "correct": correct,
        "strict": correct,
        "reward": 1.0 if correct else 0.1,
    } | changes


def evaluation(rows: list[dict[str, Any]], name: str, variant: str = "full") -> dict[str, Any]:
    """A result as evaluation writes it."""
    by_type = {}
    for kind in KINDS:
        hits = [row["correct"] for row in rows if row["problem_type"] == kind]
        by_type[kind] = sum(hits) / len(hits)
    return {
        "name": name,
        "variant": variant,
        "n": len(rows),
        "overall": sum(row["correct"] for row in rows) / len(rows),
        "by_type": by_type,
        "chance": {"answer": "A", "overall": 0.25},
    }


def rl_metrics(n_steps: int, **without: bool) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; `kl=False` leaves the KL out."""
    rng, lines = random.Random(0), []
    for step in range(1, n_steps + 1):
        reward = 0.45 + 0.4 * (1 - math.exp(-step / 30)) + rng.gauss(0, 0.05)
        metrics = {
            "reward/overall": reward,
            "reward/accuracy": min(1.0, reward + 0.02),
            "reward/format": 0.98,
            "response_length/mean": 26 + rng.random(),
            "response_length/max": 40 + rng.random(),
            "response_length/min": 22.0,
            "actor/entropy": 0.4 * math.exp(-step / 60) + 0.02 * rng.random(),
            "actor/grad_norm": 0.5 + 0.2 * rng.random(),
            "actor/clip_fraction_low": 0.001 * rng.random(),
            "actor/clip_fraction_high": 0.002 * rng.random(),
            "actor/clip_fraction_dual": 0.0,
            "mismatch/mean_abs": 3e-7 * (1 + rng.random()),
            "mismatch/max_abs": 2e-5 * (1 + rng.random()),
            "timing_s/generation": 1.4 + 0.1 * rng.random(),
            "timing_s/reward": 0.02,
            "timing_s/log_probs": 0.3,
            "timing_s/update": 0.8 + 0.1 * rng.random(),
            "perf/step_s": 2.5 + 0.1 * rng.random(),
        }
        metrics |= {f"reward/by_type/{k}": reward + 0.1 * i for i, k in enumerate(KINDS)}
        if without.get("kl", True):
            metrics["kl/ref"] = 0.02 * math.log1p(step)
        if step % 25 == 0:
            metrics["val/val/accuracy"] = min(1.0, reward)
        lines.append({"step": step, "metrics": metrics})
    return lines


def sft_metrics(n_steps: int) -> list[dict[str, Any]]:
    lines = []
    for step in range(1, n_steps + 1):
        metrics = {"train/loss": 2 * math.exp(-step / 15) + 0.3, "timing_s/update": 0.7}
        metrics |= {"train/grad_norm": 1.0 / step, "timing_s/validation": 0.0}
        if step % 10 == 0:
            metrics["val/val/loss"] = 2.1 * math.exp(-step / 15) + 0.32
        lines.append({"step": step, "metrics": metrics})
    return lines


def make_run(folder: Path, *, n: int = 40, n_steps: int = 100) -> Path:
    """Evaluations, answers, metrics, seconds and facts of a whole run."""
    rng = random.Random(1)
    sft = [prediction(i, rng.random() < 0.6) for i in range(n)]
    rl = [prediction(i, rng.random() < 0.9) for i in range(n)]
    for name, rows in (("sft", sft), ("rl", rl), ("merged", rl)):
        (folder).mkdir(parents=True, exist_ok=True)
        (folder / f"eval_{name}.json").write_text(json.dumps(evaluation(rows, name)))
        write_jsonl(folder / f"eval_{name}_answers.jsonl", rows)
    for variant, share in (("blind", 0.25), ("frames8", 0.4)):
        rows = [prediction(i, rng.random() < share) for i in range(n)]
        (folder / f"eval_rl_{variant}.json").write_text(json.dumps(evaluation(rows, "rl", variant)))
    write_jsonl(folder / "rl" / "metrics.jsonl", rl_metrics(n_steps))
    write_jsonl(folder / "sft" / "metrics.jsonl", sft_metrics(60))
    seconds = {"data": 33.1, "sft": 120.4, "rl": 251.7, "evaluation": 45.0, "merge": 3.2}
    (folder / "seconds.json").write_text(json.dumps(seconds))
    facts = {
        "seed": 0,
        "steps": {"sft": 60, "rl": n_steps},
        "title": "Quickstart: long-video questions",
        "about": {
            "task": "which event is first or last, how many: 64 frames, four options",
            "model": "Qwen2.5-VL by config, 1.1 M parameters",
        },
        "notes": ["The model is tiny, and its base model knows the shapes already."],
    }
    (folder / "run.json").write_text(json.dumps(facts))
    return folder
