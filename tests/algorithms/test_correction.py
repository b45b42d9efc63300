import math
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.correction import mismatch_metrics, rollout_correction
from verl.config import RolloutCorrectionConfig

BEYOND = 0.25


def test_equal_log_probs_show_no_mismatch_and_a_full_sample():
    logp = torch.randn(6, generator=torch.Generator().manual_seed(0))
    metrics = mismatch_metrics(logp, logp.clone(), torch.tensor([0, 0, 0, 1, 1, 2]), BEYOND)
    assert {k: float(v) for k, v in metrics.items()} == {
        "mean_abs": 0.0, "max_abs": 0.0, "beyond_share": 0.0, "k3": 0.0, "ess": 1.0,
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
        "beyond_share": fmean(abs(d) > BEYOND for d in flat),
        "k3": sum(math.exp(d) - 1 - d for d in flat) / 9,
        "ess": sum(weights) ** 2 / (3 * sum(w * w for w in weights)),
    }
    assert 0 < expected["beyond_share"] < 1
    metrics = mismatch_metrics(trainer, rollout, sequence_T, BEYOND)
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-5)


def test_one_sample_that_carries_all_the_weight_leaves_one_effective_sample():
    trainer = torch.tensor([0.0, 0.0, 900.0, 0.0])
    metrics = mismatch_metrics(trainer, torch.zeros(4), torch.arange(4), BEYOND)
    assert float(metrics["ess"]) == pytest.approx(0.25)


def test_samples_without_tokens_do_not_count():
    trainer = torch.tensor([0.0, math.log(3)])
    metrics = mismatch_metrics(trainer, torch.zeros(2), torch.tensor([0, 3]), BEYOND)
    assert float(metrics["ess"]) == pytest.approx((1 + 3) ** 2 / (2 * (1 + 9)))


def test_k3_estimates_the_kl_from_rollout_to_trainer():
    trainer = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    rollout = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    counts = torch.tensor([3, 3, 4])  # tokens as the rollout engine draws them
    pair = (trainer.repeat_interleave(counts), rollout.repeat_interleave(counts))
    metrics = mismatch_metrics(*pair, torch.arange(10), BEYOND)
    torch.testing.assert_close(metrics["k3"], (rollout.exp() * (rollout - trainer)).sum())


def test_nothing_to_compare_is_an_error():
    empty = torch.zeros(0)
    with pytest.raises(ValueError, match="no response token"):
        mismatch_metrics(empty, empty, torch.zeros(0, dtype=torch.long), BEYOND)


LEVELS = [None, "token", "sequence", "geometric"]
GAP = st.floats(-4, 4)


def by_hand(rows: list[list[float]], config: RolloutCorrectionConfig) -> list[list[float]]:
    """Weights of each sequence's tokens from their differences, in Python floats."""

    def ratios(row: list[float], level: str) -> list[float]:
        whole = {"sequence": math.exp(sum(row)), "geometric": math.exp(sum(row) / len(row))}
        return [math.exp(d) if level == "token" else whole[level] for d in row]

    weights = []
    for row in rows:
        own = [1.0] * len(row)
        if config.rollout_is is not None:
            most = config.rollout_is_threshold
            own = [min(r, most) for r in ratios(row, config.rollout_is)]
        if config.rollout_rs is not None:
            high = config.rollout_rs_threshold
            low = config.rollout_rs_threshold_lower
            assert high is not None and low is not None
            kept = [low <= r <= high for r in ratios(row, config.rollout_rs)]
            own = [w * k for w, k in zip(own, kept, strict=True)]
        weights.append(own)
    return weights


@pytest.mark.parametrize("level", LEVELS[:3])
@pytest.mark.parametrize("rejection", LEVELS)
@given(
    rows=st.lists(st.lists(GAP, min_size=1, max_size=5), min_size=1, max_size=4),
    low=st.floats(0, 0.99),
    high=st.floats(1.01, 9),
)
def test_weights_equal_a_loop_over_tokens(level, rejection, rows, low, high):
    config = RolloutCorrectionConfig(
        rollout_is=level, rollout_rs=rejection,
        rollout_rs_threshold=high, rollout_rs_threshold_lower=low,
    )  # fmt: skip
    d_T = torch.tensor([d for row in rows for d in row], dtype=torch.float64)
    rollout_T = -torch.rand(len(d_T), dtype=torch.float64)
    of_T = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(r) for r in rows]))
    found = rollout_correction(rollout_T + d_T, rollout_T, of_T, config)
    expected = [w for row in by_hand(rows, config) for w in row]
    assert found.weight_T.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(found.counts["mean"]) == pytest.approx(sum(expected), rel=1e-5)
    assert int(found.counts["masked_share"]) == expected.count(0.0)
    most = sum(w == pytest.approx(2.0, rel=1e-9) for w in expected) if level else 0
    assert int(found.counts["clipped_share"]) == most


@pytest.mark.parametrize("level", LEVELS[:3])
@pytest.mark.parametrize("rejection", LEVELS)
def test_equal_engines_have_weights_of_exactly_one(level, rejection):
    logp = -torch.rand(6, generator=torch.Generator().manual_seed(0))
    config = RolloutCorrectionConfig(rollout_is=level, rollout_rs=rejection)
    found = rollout_correction(logp, logp.clone(), torch.tensor([0, 0, 0, 1, 1, 2]), config)
    assert found.weight_T.tolist() == [1.0] * 6
    assert {k: float(v) for k, v in found.counts.items()} == {
        "mean": 6.0, "clipped_share": 0.0, "masked_share": 0.0,
    }  # fmt: skip


def test_by_default_a_weight_ends_at_2_and_bounds_are_its_inverse():
    default = RolloutCorrectionConfig(rollout_is="token", rollout_rs="token")
    logp = torch.tensor([2.1, 1.9, 1.0, 0.51, 0.49]).log()
    found = rollout_correction(logp, torch.zeros(5), torch.arange(5), default)
    assert found.weight_T.tolist() == pytest.approx([0, 1.9, 1.0, 0.51, 0])
    whole = RolloutCorrectionConfig(rollout_is=None, rollout_rs="geometric")
    logp = torch.tensor([1.02, 1.0, 1.02, 1.02, 0.98]).log()
    found = rollout_correction(logp, torch.zeros(5), torch.tensor([0, 0, 1, 1, 2]), whole)
    assert found.weight_T.tolist() == [1, 1, 0, 0, 0]


def test_engines_far_apart_neither_overflow_nor_teach():
    logp = torch.tensor([900.0, -900.0])
    config = RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold=3)
    found = rollout_correction(logp, torch.zeros(2), torch.arange(2), config)
    assert found.weight_T.tolist() == [3.0, 0.0]


def test_auto_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="rollout_is=auto was not resolved"):
        rollout_correction(
            torch.zeros(1), torch.zeros(1), torch.zeros(1), RolloutCorrectionConfig()
        )
    with pytest.raises(ValueError, match="one value a response token"):
        rollout_correction(
            torch.zeros(2), torch.zeros(1), torch.zeros(2), RolloutCorrectionConfig(rollout_is=None)
        )
