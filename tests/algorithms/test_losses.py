import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from verl.algorithms.losses import ClipRange, PolicyLoss, average, policy_loss

CLIP = ClipRange(low=0.2, high=0.3, dual=3.0)
LENGTHS = [1, 2, 4, 9]


@dataclass
class Batch:
    """Ragged samples: log-probs far enough apart that every kind of clip happens."""

    logp: list[Tensor]
    old: list[Tensor]
    advantages: list[float]

    @classmethod
    def random(cls, seed: int = 0, lengths: tuple[int, ...] = (1, 7, 3, 12, 2, 40)) -> "Batch":
        rng = torch.Generator().manual_seed(seed)
        old = [-torch.rand(n, generator=rng, dtype=torch.float64) * 5 for n in lengths]
        logp = [o + torch.randn(len(o), generator=rng, dtype=torch.float64) * 0.9 for o in old]
        advantages = torch.randn(len(lengths), generator=rng, dtype=torch.float64).tolist()
        return cls(logp, old, [0.0, *advantages[1:]])

    @property
    def n_tokens(self) -> int:
        return sum(len(x) for x in self.logp)

    def loss(
        self, averaging, rows: list[int] | None = None, clip: ClipRange = CLIP
    ) -> tuple[PolicyLoss, list[Tensor]]:
        """Loss of some rows as one micro-batch, and the gradient of each row's log-probs."""
        rows = list(range(len(self.logp))) if rows is None else rows
        leaves = [self.logp[i].clone().requires_grad_() for i in rows]
        lengths = torch.tensor([len(x) for x in leaves])
        result = policy_loss(
            torch.cat(leaves),
            torch.cat([self.old[i] for i in rows]),
            torch.tensor([self.advantages[i] for i in rows], dtype=torch.float64),
            torch.arange(len(rows)).repeat_interleave(lengths),
            clip=clip,
            averaging=averaging,
            n_tokens=self.n_tokens,
            n_sequences=len(self.logp),
        )
        result.loss.backward()
        return result, [x.grad for x in leaves if x.grad is not None]


def token_by_hand(logp: float, old: float, advantage: float, clip: ClipRange):
    """Loss of one token, its derivative, and which bound holds it: PPO as in the papers."""
    ratio = math.exp(logp - old)
    objective = min(ratio * advantage, min(max(ratio, 1 - clip.low), 1 + clip.high) * advantage)
    if advantage > 0:
        held = "high" if ratio > 1 + clip.high else ""
    elif advantage < 0:
        objective = max(objective, clip.dual * advantage)
        held = "low" if ratio < 1 - clip.low else "dual" if ratio > clip.dual else ""
    else:
        held = ""
    return -objective, 0.0 if held else -ratio * advantage, held


def by_hand(batch: Batch, averaging: str, clip: ClipRange = CLIP):
    """Loss, gradients and metrics of the whole batch, token by token in Python floats."""
    loss, gradients = 0.0, []
    counts = dict.fromkeys(("low", "high", "dual", "kl", "k3"), 0.0)
    for logp, old, advantage in zip(batch.logp, batch.old, batch.advantages, strict=True):
        n = batch.n_tokens if averaging == "token" else len(logp) * len(batch.logp)
        row = []
        for x, y in zip(logp.tolist(), old.tolist(), strict=True):
            value, derivative, held = token_by_hand(x, y, advantage, clip)
            loss += value / n
            row.append(derivative / n)
            counts["kl"] += (y - x) / batch.n_tokens
            counts["k3"] += (math.exp(x - y) - 1 - (x - y)) / batch.n_tokens
            if held:
                counts[held] += 1 / batch.n_tokens
        gradients.append(torch.tensor(row, dtype=torch.float64))
    return loss, gradients, counts


@pytest.mark.parametrize("averaging", ["token", "seq"])
@pytest.mark.parametrize("seed", range(4))
def test_loss_gradient_and_metrics_equal_a_loop_over_tokens(averaging: str, seed: int):
    batch = Batch.random(seed)
    result, gradients = batch.loss(averaging)
    loss, expected, counts = by_hand(batch, averaging)
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(gradients, expected, atol=1e-12, rtol=1e-9)
    named = {
        "clip_fraction_low": "low", "clip_fraction_high": "high", "clip_fraction_dual": "dual",
        "ppo_kl": "kl", "ppo_kl_k3": "k3",
    }  # fmt: skip
    for name, key in named.items():
        assert float(result.metrics[name]) == pytest.approx(counts[key], abs=1e-12), name
    assert result.metrics.keys() == named.keys()


def test_the_random_batches_reach_every_clip():
    counts = [by_hand(Batch.random(seed), "token")[2] for seed in range(4)]
    assert all(any(c[bound] > 0 for c in counts) for bound in ("low", "high", "dual"))


@pytest.mark.parametrize("averaging", ["token", "seq"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_loss_gradient_and_metrics_are_the_same_for_any_micro_batching(averaging: str, micro: int):
    batch = Batch.random(1)
    whole, gradients = batch.loss(averaging)
    parts = [batch.loss(averaging, list(range(i, min(i + micro, 6)))) for i in range(0, 6, micro)]
    torch.testing.assert_close(sum(p.loss for p, _ in parts), whole.loss)
    torch.testing.assert_close([g for _, row in parts for g in row], gradients)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(p.metrics[name] for p, _ in parts), value)


@pytest.mark.parametrize("averaging", ["token", "seq"])
def test_loss_and_gradients_do_not_depend_on_row_order(averaging: str):
    batch, order = Batch.random(2), [3, 0, 5, 1, 4, 2]
    (whole, gradients), (shuffled, moved) = batch.loss(averaging), batch.loss(averaging, order)
    torch.testing.assert_close(shuffled.loss, whole.loss)
    torch.testing.assert_close(moved, [gradients[i] for i in order])


def averages(averaging, micro: int, naive: bool = False) -> float:
    """Mean of 1, 2, ..., 16 over samples of 1, 2, 4 and 9 tokens, in micro-batches."""
    rows = list(torch.arange(1.0, 17.0).split(LENGTHS))
    shares = []
    for i in range(0, 4, micro):
        part = rows[i : i + micro]
        sequence_T = torch.arange(len(part)).repeat_interleave(torch.tensor([len(x) for x in part]))
        counts = (len(sequence_T), len(part)) if naive else (16, 4)
        values_T = torch.cat(part)
        shares.append(
            average(values_T, sequence_T, averaging, n_tokens=counts[0], n_sequences=counts[1])
        )
    return float(sum(shares)) / (len(shares) if naive else 1)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_token_mean_and_sequence_mean_keep_their_own_value_at_any_micro_batch_size(micro: int):
    assert averages("token", micro) == pytest.approx(8.5)  # (1 + ... + 16) / 16
    assert averages("seq", micro) == pytest.approx(5.25)  # (1 + 2.5 + 5.5 + 12) / 4


def test_counts_of_the_micro_batch_alone_would_give_three_different_token_means():
    naive = [averages("token", micro, naive=True) for micro in (1, 2, 4)]
    assert naive == pytest.approx([5.25, 6.0, 8.5])


@pytest.mark.parametrize("averaging", ["token", "seq"])
def test_on_the_sampling_policy_the_gradient_is_the_plain_policy_gradient(averaging: str):
    batch = Batch.random(3)
    batch.logp = batch.old
    result, gradients = batch.loss(averaging)
    for gradient, advantage in zip(gradients, batch.advantages, strict=True):
        n = batch.n_tokens if averaging == "token" else len(gradient) * len(batch.logp)
        torch.testing.assert_close(gradient, torch.full_like(gradient, -advantage / n))
    assert all(float(v) == 0 for v in result.metrics.values())


def test_samples_without_advantage_have_neither_loss_nor_gradient():
    batch = Batch.random(4)
    batch.advantages = [0.0] * 6
    result, gradients = batch.loss("token")
    assert result.loss.item() == 0
    assert all(not g.any() for g in gradients)


def test_dual_clip_bounds_the_loss_where_the_advantage_is_negative():
    def loss_at(ratio: float) -> float:
        batch = Batch([torch.tensor([math.log(ratio)])], [torch.zeros(1)], [-2.0])
        return batch.loss("token")[0].loss.item()

    assert loss_at(2.9) == pytest.approx(5.8, rel=1e-5)
    assert loss_at(3.1) == loss_at(100.0) == pytest.approx(6.0)


def test_an_extreme_ratio_stays_finite_and_clipped():
    batch = Batch([torch.tensor([0.0, -500.0, 0.0])], [torch.tensor([-500.0, 0.0, 0.0])], [1.0])
    result, (gradient,) = batch.loss("token")
    assert result.loss.isfinite() and gradient.isfinite().all()
    assert gradient[0] == 0 and abs(gradient[1]) < 1e-8


def test_gradient_flows_through_the_new_log_probs_only():
    logp, old, advantage = (torch.zeros(2, requires_grad=True) for _ in range(3))
    result = policy_loss(
        logp, old, advantage + 1, torch.tensor([0, 1]),
        clip=CLIP, averaging="token", n_tokens=2, n_sequences=2,
    )  # fmt: skip
    result.loss.backward()
    assert logp.grad is not None and old.grad is None and advantage.grad is None


def test_a_micro_batch_without_tokens_adds_nothing_and_can_be_differentiated():
    logp = torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    result = policy_loss(
        logp, logp.detach(), torch.zeros(0), empty,
        clip=CLIP, averaging="seq", n_tokens=5, n_sequences=2,
    )  # fmt: skip
    result.loss.backward()
    assert result.loss.item() == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"low": 1.5}, "clip_ratio_low=1.5 must be in 0 to 1"),
        ({"high": -0.1}, "clip_ratio_high=-0.1 must not be negative"),
        ({"dual": 1.0}, "clip_ratio_dual=1.0 must be above 1"),
    ],
)
def test_impossible_clip_ranges_name_the_setting(settings: dict[str, float], words: str):
    with pytest.raises(ValueError, match=words):
        ClipRange(**settings)


def test_wrong_averages_and_counts_are_refused():
    values_T, sequence_T = torch.ones(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="loss_avg_mode='sequence' is unknown; use token or seq"):
        average(values_T, sequence_T, "sequence", n_tokens=2, n_sequences=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_tokens=0"):
        average(values_T, sequence_T, "token", n_tokens=0, n_sequences=1)


def test_tensors_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"one value a response token .*\(2, 1\)"):
        policy_loss(
            torch.zeros(2), torch.zeros(2, 1), torch.zeros(1), torch.zeros(2, dtype=torch.long),
            clip=CLIP, averaging="token", n_tokens=2, n_sequences=1,
        )  # fmt: skip
