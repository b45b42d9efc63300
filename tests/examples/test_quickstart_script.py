"""What the quickstart says before, between and after its stages; the stages are empty here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMOKE = "smoke run: 4 SFT and 2 GRPO steps; accuracies mean nothing here"


def quickstart(folder: Path, **variables: str) -> list[str]:
    """Lines that the script prints where set-up and every Python program succeed at once."""
    stubs = {
        "scripts/setup.sh": "echo set-up",
        ".venv/bin/python": '#!/usr/bin/env bash\nmkdir -p "$OUT/data"\n',
    }
    for name, text in stubs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o700)
    (folder / "examples").mkdir()
    for name in ("stages.sh", "quickstart.sh"):
        script = Path(shutil.copy(ROOT / "examples" / name, folder / "examples"))
    env = {**os.environ, "OUT": str(folder / "out")} | variables
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_comes_how_long_it_takes_and_where_it_goes_is_said_before_anything_is_done(tmp_path):
    said = quickstart(tmp_path, QUICKSTART_SMOKE="0")
    before = "\n".join(said[: said.index("set-up")])
    assert "CoT-SFT, evaluation, GRPO" in before and "6 to 10 minutes" in before
    assert f"results go to {tmp_path / 'out'}" in before
    assert not any(SMOKE in line for line in said)


def test_a_smoke_run_says_first_and_last_that_its_accuracies_mean_nothing(tmp_path):
    said = quickstart(tmp_path, QUICKSTART_SMOKE="1")
    assert [i for i, line in enumerate(said) if SMOKE in line] == [2, len(said) - 1]
