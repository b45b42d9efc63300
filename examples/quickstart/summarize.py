"""Gathers what the quickstart's stages left: `python3 summarize.py OUT --seed N`.

Writes `eval_rl.json` from the trainer's last validation, `seconds.json` and `run.json`; then
`verl.trainer.report` makes `summary.json` and `report.html` of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from verl.trainer.report import report_of_run
from verl.trainer.validation import evaluation_record

NOTES = [
    "The data are synthetic: coloured shapes appear one after another in 64-frame videos.",
    "The base model is tiny and was trained beforehand to describe such videos and to answer "
    "questions about descriptions given as text, never to answer questions about videos "
    "(examples/quickstart/make_base.py).",
    "The chains of thought for fine-tuning come from an annotator who misses the first or last "
    "shape in seven of ten rows: such chains are consistent and wrong. RL sees right answers only "
    "as rewards. One of twelve videos for fine-tuning shows nothing, and its chains guess.",
    "Accuracies are greedy unless the name says temperature 1. rl is the trainer's own validation "
    "after the last step; merged is the merged Hugging Face folder, loaded and evaluated anew; "
    "blind and few_frames show that model blank frames and 8 frames.",
]
ABOUT = {
    "blind": "all frames blank, model after RL",
    "few_frames": "8 of 64 frames, model after RL",
    "sft_temperature1": "after SFT, sampled at temperature 1",
    "merged_temperature1": "after RL, sampled at temperature 1",
}
CONTROL = {"sft_longer": "control: SFT for as long as SFT and RL took"}


def last_validation(out: Path) -> tuple[int, list[dict[str, Any]]]:
    """The newest validation of the test split: (step, answers)."""
    files = (out / "rl" / "validation").glob("test_step_*.jsonl")
    newest = max(files, key=lambda p: int(p.stem.rpartition("_")[2]))
    rows = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    shutil.copyfile(newest, out / "predictions_rl.jsonl")
    return int(newest.stem.rpartition("_")[2]), rows


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    steps, rows = last_validation(args.out)
    _write(args.out / "eval_rl.json", evaluation_record("rl", rows, temperature=0.0))
    kept = (p for p in (args.out / "seconds").iterdir() if p.suffix != ".part")
    files = sorted(kept, key=lambda p: p.stat().st_mtime)
    _write(args.out / "seconds.json", {p.name: int(p.read_text()) for p in files})
    facts = {
        "title": "Quickstart: CoT-SFT, then GRPO, on long synthetic videos",
        "seed": args.seed,
        "steps": steps,
        "notes": NOTES,
        "about": ABOUT | (CONTROL if (args.out / "eval_sft_longer.json").exists() else {}),
    }
    _write(args.out / "run.json", facts)
    page = report_of_run(args.out)
    accuracy = json.loads((args.out / "summary.json").read_text(encoding="utf-8"))["accuracy"]
    for name, score in accuracy.items():
        print(f"  {name:11} {100 * score['overall']:5.1f}%  of {score['n']}")
    print(f"report: {page}")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
