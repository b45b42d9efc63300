import math

import pytest
import torch

from verl.algorithms.correction import mismatch_metrics


def test_equal_log_probs_show_no_mismatch_and_a_full_sample():
    logp = torch.randn(6, generator=torch.Generator().manual_seed(0))
    metrics = mismatch_metrics(logp, logp.clone(), torch.tensor([0, 0, 0, 1, 1, 2]))
    assert {k: float(v) for k, v in metrics.items()} == {
        "mean_abs": 0.0, "max_abs": 0.0, "k3": 0.0, "ess": 1.0,
    }  # fmt: skip


def test_metrics_equal_a_loop_over_samples():
    rng = torch.Generator().manual_seed(1)
    lengths, sequence_T = [3, 1, 5], torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    rollout = torch.randn(9, generator=rng)
    trainer = rollout + 0.3 * torch.randn(9, generator=rng)
    rows = [d.tolist() for d in (trainer.double() - rollout.double()).split(lengths)]
    flat = [d for row in rows for d in row]
    weights = [math.exp(sum(row)) for row in rows]
    expected = {
        "mean_abs": sum(map(abs, flat)) / 9,
        "max_abs": max(map(abs, flat)),
        "k3": sum(math.exp(d) - 1 - d for d in flat) / 9,
        "ess": sum(weights) ** 2 / (3 * sum(w * w for w in weights)),
    }
    metrics = mismatch_metrics(trainer, rollout, sequence_T)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-5)


def test_one_sample_that_carries_all_the_weight_leaves_one_effective_sample():
    trainer = torch.tensor([0.0, 0.0, 900.0, 0.0])
    metrics = mismatch_metrics(trainer, torch.zeros(4), torch.arange(4))
    assert float(metrics["ess"]) == pytest.approx(0.25)


def test_samples_without_tokens_do_not_count():
    trainer = torch.tensor([0.0, math.log(3)])
    metrics = mismatch_metrics(trainer, torch.zeros(2), torch.tensor([0, 3]))
    assert float(metrics["ess"]) == pytest.approx((1 + 3) ** 2 / (2 * (1 + 9)))


def test_k3_estimates_the_kl_from_rollout_to_trainer():
    trainer = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    rollout = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    counts = torch.tensor([3, 3, 4])  # tokens as the rollout engine draws them
    pair = (trainer.repeat_interleave(counts), rollout.repeat_interleave(counts))
    metrics = mismatch_metrics(*pair, torch.arange(10))
    torch.testing.assert_close(metrics["k3"], (rollout.exp() * (rollout - trainer)).sum())


def test_nothing_to_compare_is_an_error():
    empty = torch.zeros(0)
    with pytest.raises(ValueError, match="no response token"):
        mismatch_metrics(empty, empty, torch.zeros(0, dtype=torch.long))
