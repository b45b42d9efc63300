"""The check of a device runs, and its recipes agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_recipe_of_a_cpu_runs_and_they_agree(tmp_path):
    out = tmp_path / "check.json"
    command = [sys.executable, "benchmarks/check_device.py", "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    training = json.loads(out.read_text())["training"]
    assert {"auto", "tiles of 100", "activations offloaded", "moments in bf16"} <= set(training)
    first = training["auto"]["grad_norms"]
    for name, found in training.items():
        assert found["mismatch_max_abs"] < 1e-4, name
        # Later steps with rounded moments are other steps.
        n = 1 if name == "moments in bf16" else 3
        assert found["grad_norms"][:n] == pytest.approx(first[:n], rel=1e-3), name
