"""A shared prompt is no further from float32 in bf16 than replicated ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_shared_prompt_has_the_error_of_replicated_ones(tmp_path):
    out = tmp_path / "errors.json"
    command = [sys.executable, "benchmarks/bf16_error.py", "--device", "cpu"]
    command += ["--prompt", "100", "--groups", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, check=True, timeout=300
    )
    replicated, shared, of = json.loads(out.read_text())["measured"]
    assert (replicated["prompt"], shared["prompt"]) == ("replicated", "shared")
    for name in ("log_probs", "gradient", "worst_parameter"):
        assert 1e-4 < shared[name] < 0.1
        assert of[name] == shared[name] / replicated[name] < 1.1
