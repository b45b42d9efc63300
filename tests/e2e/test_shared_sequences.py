"""A run whose workers share every sequence learns what a run with sequences of its own learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.jobs import rl_job

STEPS = ("trainer.max_steps=2", "trainer.save_freq=-1")
MEASURED = ("reward/", "critic/", "actor/pg_loss", "actor/grad_norm", "actor/entropy", "response")


def last_metrics(out: Path) -> dict[str, float]:
    found = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["metrics"]
    return {k: v for k, v in found.items() if k.startswith(MEASURED)}


def test_workers_that_share_sequences_learn_the_same(tmp_path):
    job = rl_job(tmp_path)
    apart = last_metrics(job.finish(*STEPS, "trainer.n_gpus_per_node=2").out)
    shared = job.finish(
        *STEPS, "trainer.n_gpus_per_node=2", "worker.actor.ulysses_size=2", out=tmp_path / "shared"
    )
    together = last_metrics(shared.out)
    assert "actor/grad_norm" in together and together.keys() == apart.keys()
    assert together == pytest.approx(apart, rel=2e-3, abs=1e-5)
