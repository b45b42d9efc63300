"""One self-contained page about a run: `python3 -m verl.trainer.report --run DIR`.

Accuracy, curves, seconds and sample questions with their frames, in one HTML file that needs
nothing from the network. What is missing is said to be missing; nothing is made up for it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from verl.trainer.report_charts import draw_charts, read_metrics
from verl.trainer.report_samples import (
    Agreement,
    SampleCard,
    choose,
    compare,
    first_and_last,
    make_cards,
    read_predictions,
)
from verl.trainer.summary import NAMES, build_summary, predictions_file

logger = logging.getLogger(__name__)

MEANING = {
    "chance": "always the same answer, the best one",
    "blind": "every frame blanked",
    "few_frames": "a fraction of the frames",
    "base": "before any training here",
    "sft": "after fine-tuning on written chains of thought",
    "rl": "after reinforcement learning",
    "merged": "the exported Hugging Face folder, loaded again",
}
CAPITALS = {"sft": "SFT", "rl": "RL"}


@dataclass(frozen=True)
class AccuracyRow:
    """One line of the accuracy table; shares in [0, 1]."""

    label: str
    meaning: str
    n: int | None
    overall: float
    margin: float | None
    """Half of the 95% interval, for `n` independent questions."""
    by_type: list[float | None]
    emphasised: bool


@dataclass(frozen=True)
class PhaseRow:
    """One line of a table of seconds."""

    name: str
    seconds: float
    share: float
    each: float | None
    """Seconds a step; None for stages of the whole run."""


@dataclass(frozen=True)
class PhaseTable:
    """Where the time of one stage went."""

    title: str
    rows: list[PhaseRow]
    n_steps: int | None


def write_report(
    output: Path | str,
    *,
    summary: Mapping[str, Any],
    metrics_jsonl: Sequence[Path] = (),
    predictions: Mapping[str, Path] | None = None,
    generations_jsonl: Path | None = None,
    n_frames: int = 64,
    n_samples: int = 6,
    title: str = "Training report",
    notes: Sequence[str] = (),
) -> Path:
    """Writes the page and returns its path.

    Args:
        summary: as in `summary.json`; every part of it may be missing.
        metrics_jsonl: files of `{"step", "metrics"}` lines, named after their folders.
        predictions: answers by the name of the evaluation, in order of time (`sft`, then `rl`).
        generations_jsonl: logged generations; used for samples where there are no predictions.
        n_frames: frames that the model saw of each video.
        n_samples: questions to show.
        notes: what a reader must know to judge the numbers, in plain sentences.
    """
    sources = {_source_name(path): read_metrics(path) for path in metrics_jsonl}
    charts, empty = draw_charts(sources)
    agreement, cards, labels = _samples(predictions or {}, generations_jsonl, n_frames, n_samples)
    kinds, accuracy = accuracy_table(summary.get("accuracy") or {}, summary.get("about") or {})
    page = _template().render(
        title=title,
        headline=headline(summary.get("accuracy") or {}),
        facts=_facts(summary),
        kinds=kinds,
        accuracy=accuracy,
        charts=charts,
        empty_charts=empty,
        phase_tables=_phase_tables(summary.get("seconds") or {}, sources),
        agreement=agreement,
        cards=cards,
        labels=labels,
        notes=list(notes),
    )
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}%"
    environment.filters["seconds"] = seconds_text
    return environment.get_template("report.html.jinja")


def _source_name(path: Path) -> str:
    return Path(path).resolve().parent.name


def accuracy_table(
    accuracy: Mapping[str, Mapping[str, Any]], about: Mapping[str, str] | None = None
) -> tuple[list[str], list[AccuracyRow]]:
    """Kinds of question, and one row an evaluation, the known ones first and in order.

    `about` says in words what an evaluation is, where that is not the usual.
    """
    about = about or {}
    kinds = sorted({kind for scores in accuracy.values() for kind in scores.get("by_type") or {}})
    names = [n for n in NAMES if n in accuracy] + [n for n in accuracy if n not in NAMES]
    rows = []
    for name in names:
        scores = accuracy[name]
        n, by_type = scores.get("n"), scores.get("by_type") or {}
        rows.append(
            AccuracyRow(
                label=_label(name),
                meaning=about.get(name) or _meaning(name, scores),
                n=n,
                overall=scores["overall"],
                margin=half_interval(scores["overall"], n) if n and name != "chance" else None,
                by_type=[by_type.get(kind) for kind in kinds],
                emphasised=name == "rl",
            )
        )
    return kinds, rows


def _label(name: str) -> str:
    """`SFT longer` for `sft_longer`."""
    return " ".join(CAPITALS.get(word, word) for word in name.split("_"))


def _meaning(name: str, scores: Mapping[str, Any]) -> str:
    """What an evaluation is where nobody has said it."""
    sampled = scores.get("temperature") or 0.0
    known = MEANING.get(name, "")
    return known or (f"sampled at temperature {sampled:g}" if sampled else "")


def half_interval(share: float, n: int) -> float:
    """Half the width of Wilson's 95% interval for a share of `n` independent trials."""
    z = 1.96
    spread = math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return z * spread / (1 + z**2 / n)


def headline(accuracy: Mapping[str, Mapping[str, Any]]) -> str:
    """The result in a sentence; empty without an evaluation before and after RL."""
    if "sft" not in accuracy or "rl" not in accuracy:
        return ""
    before, after = accuracy["sft"]["overall"], accuracy["rl"]["overall"]
    n = accuracy["rl"].get("n")
    verb = "raised" if after > before else "lowered" if after < before else "left"
    text = f"Reinforcement learning {verb} accuracy from {100 * before:.1f}% to {100 * after:.1f}%"
    text += f" ({100 * (after - before):+.1f} points)"
    if verb == "left":
        text = f"Reinforcement learning left accuracy at {100 * after:.1f}%"
    text += f" on {n} held-out questions" if n else ""
    others = [("chance", "always giving the same answer"), ("blind", "answering without frames")]
    parts = [
        f"{what} gives {100 * accuracy[k]['overall']:.1f}%" for k, what in others if k in accuracy
    ]
    return text + ("; " + ", ".join(parts) if parts else "") + "."


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Header lines: what was run, on what, with which versions."""
    captions = summary.get("accuracy") or {}
    about = summary.get("about") or {}
    facts = [(str(k), _text(v)) for k, v in about.items() if k not in captions]
    seconds = summary.get("seconds") or {}
    if seconds:
        facts.append(("total time", seconds_text(seconds.get("total") or sum(seconds.values()))))
    for key in ("steps", "seed", "hardware", "versions"):
        if summary.get(key) is not None:
            facts.append((key, _text(summary[key])))
    return facts


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def seconds_text(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `4 min 05 s` or `2 h 03 min`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _phase_tables(
    seconds: Mapping[str, float], sources: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
) -> list[PhaseTable]:
    stages = {name: float(value) for name, value in seconds.items() if name != "total"}
    tables = [PhaseTable("Stages of the whole run", _phase_rows(stages, None), None)]
    for source, metrics in sources.items():
        prefix = "timing_s/"
        spent = {
            name.removeprefix(prefix): sum(value for _, value in points)
            for name, points in metrics.items()
            if name.startswith(prefix)
        }
        n_steps = len({step for points in metrics.values() for step, _ in points if step > 0})
        tables.append(
            PhaseTable(f"Phases of the steps of {source}", _phase_rows(spent, n_steps), n_steps)
        )
    return [table for table in tables if table.rows]


def _phase_rows(seconds: Mapping[str, float], n_steps: int | None) -> list[PhaseRow]:
    total = sum(seconds.values()) or 1.0
    return [
        PhaseRow(name.replace("_", " "), value, value / total, value / n_steps if n_steps else None)
        for name, value in seconds.items()
    ]


def _samples(
    predictions: Mapping[str, Path], generations: Path | None, n_frames: int, n_samples: int
) -> tuple[Agreement | None, list[SampleCard], list[str]]:
    """Counts of what changed, cards, and the labels of before and after."""
    answered = {_label(name): read_predictions(path) for name, path in predictions.items()}
    if not answered and generations is not None:
        answered = first_and_last(generations)
    if not answered:
        return None, [], []
    labels = list(answered)
    before, after = answered[labels[0]], answered[labels[-1]]
    agreement = compare(before, after) if len(labels) > 1 else None
    uids = choose(before, after, n_samples)
    ends = {label: answered[label] for label in dict.fromkeys((labels[0], labels[-1]))}
    return agreement, list(make_cards(uids, ends, n_frames)), list(ends)


def report_of_run(run_dir: Path, output: Path | None = None, **settings: Any) -> Path:
    """Writes `summary.json` and `report.html` of a folder that the stages of a run have filled.

    The folder holds what `build_summary` reads, `predictions_<name>.jsonl` or
    `eval_<name>_answers.jsonl` of `sft` and `rl` (or `merged`, which is the same model), and
    `metrics.jsonl` in it or in folders below. Without evaluations an existing `summary.json` is
    used. `settings` go to `write_report`.
    """
    stored = run_dir / "summary.json"
    summary: dict[str, Any] = {}
    if any(run_dir.glob("eval_*.json")):
        summary = build_summary(run_dir)
        stored.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    elif stored.exists():
        summary = json.loads(stored.read_text(encoding="utf-8"))
    after = next((name for name in ("rl", "merged") if predictions_file(run_dir, name)), "rl")
    files = {name: predictions_file(run_dir, name) for name in ("sft", after)}
    generations = sorted(run_dir.rglob("generations.jsonl"))
    given = {
        "metrics_jsonl": sorted(run_dir.rglob("metrics.jsonl")),
        "predictions": {name: path for name, path in files.items() if path is not None},
        "generations_jsonl": generations[-1] if generations else None,
        "title": summary.get("title") or f"Training report: {run_dir.resolve().name}",
        "notes": summary.get("notes") or (),
    }
    return write_report(output or run_dir / "report.html", summary=summary, **(given | settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser("verl.trainer.report", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="page to write; default RUN/report.html")
    parser.add_argument("--title", help="headline of the page")
    parser.add_argument("--frames", type=int, default=64, help="frames the model saw of a video")
    parser.add_argument("--samples", type=int, default=6, help="questions to show")
    parser.add_argument("--note", action="append", default=[], help="sentence for the notes")
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        parser.error(f"--run {args.run}: is not a folder; name the folder that a run has written")
    settings: dict[str, Any] = {"n_frames": args.frames, "n_samples": args.samples}
    if args.title:
        settings["title"] = args.title
    if args.note:
        settings["notes"] = args.note
    path = report_of_run(args.run, args.out, **settings)
    sys.stdout.write(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
