"""The rungs of the training ladder differ in time alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_rung_runs_here_and_has_the_same_gradient(tmp_path):
    out = tmp_path / "ladder.json"
    command = [sys.executable, "benchmarks/train_ladder.py", "--model", "tiny", "--prompts", "1k"]
    settings = ["--replicated", "8", "--response", "32", "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *settings], cwd=ROOT, env=environment, check=True, timeout=300)
    rows = json.loads(out.read_text())["measured"]
    assert [row["rung"] for row in rows] == ["b", "c", "d", "e", "f"]
    assert all(row["of_8"] == 8 and row["group_s"] > 0 for row in rows)
    # The last asks other questions as well, of a row that shares the video.
    norms = [row["grad_norm"] for row in rows[:4]]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-4) and norms[0] > 0
