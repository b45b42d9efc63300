"""The actor: log-probabilities of given responses, and the policy update.

Letters: T target tokens, B samples.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from verl.algorithms.correction import rollout_correction
from verl.algorithms.kl import kl_loss
from verl.algorithms.losses import ClipRange, policy_loss
from verl.config import ActorConfig, AlgorithmConfig
from verl.protocol import DataProto
from verl.sequence_parallel.packing import PackedRow
from verl.workers.batches import dummy_row, micro_batches, most_of_ranks, response_rows
from verl.workers.encoder import MediaEncoder
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.media_stores import media_of


@dataclass(frozen=True)
class StepTotals:
    """What one optimizer step is normalised by: counts over all ranks and micro-batches."""

    n_tokens: int
    n_sequences: int
    n_computed_tokens: int | None = None
    """Of the samples that the step computes; None: of all. Those without a gradient may be left
    out of the computation, and count in the means all the same."""


class DataParallelActor:
    """Runs an engine over this rank's share of a batch.

    Micro-batching, packing and data parallelism change neither loss nor gradient, since losses are
    sums divided by global counts.
    """

    def __init__(
        self,
        engine: FSDPEngine,
        encoder: MediaEncoder,
        actor: ActorConfig,
        algorithm: AlgorithmConfig,
    ) -> None:
        self._engine = engine
        self._encoder = encoder
        self._actor = actor
        self._algorithm = algorithm
        self._seen: list[Tensor] = []  # log-probs of the current step's forward passes
        self._clip = ClipRange(actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_dual)

    @torch.no_grad()
    def log_probs(self, batch: DataProto, temperature: float) -> list[Tensor]:
        """Log-probabilities of every response, (R,) float32 each, on the host."""
        self._encoder.prepare(media_of(batch["media"]))
        logps: list[Tensor] = []
        size = self._actor.micro_batch_size_per_device_for_experience
        for micro in self._micro_batches(batch, size):
            logp_T, _ = self._forward(micro, temperature)
            logps.extend(logp_T.cpu().split([len(r) for r in micro["response_ids"]]))
        return logps

    def _micro_batches(self, batch: DataProto, samples: int) -> list[DataProto]:
        """This rank's, filled up with empty ones: all ranks join in as many passes.

        At least one: a step of which no sample is computed has a gradient all the same, zero.
        """
        actor, tokens = self._actor, self._actor.max_tokens_per_device
        if tokens is not None:
            tokens *= self._engine.sequence_size
        if not actor.padding_free:
            samples, tokens = 1, None
        micros = micro_batches(
            batch, samples=samples, tokens=tokens, shared_prefix=actor.shared_prefix
        )
        most = max(1, most_of_ranks(len(micros), self._engine.device))
        return micros + [batch.take([])] * (most - len(micros))

    def update(
        self, batch: DataProto, totals: list[StepTotals], temperature: float
    ) -> tuple[dict[str, list[float]], list[Tensor]]:
        """One optimizer step a mini-batch, over `ppo_epochs`.

        `batch` holds this rank's share, and column mini says of which mini-batch a sample is; it
        may be left out where there is one. Returns this rank's metric shares a step, which the
        driver adds over ranks, and the log-probabilities of every response under the policy that
        sampled it. Column rollout_logp, the engine's own of these, makes the loss be corrected by
        `algorithm.rollout_correction`.

        Raises ValueError for several steps without column old_logp: from the second step on, the
        policy is no longer the one that sampled.
        """
        steps = self._actor.ppo_epochs * len(totals)
        if steps > 1 and "old_logp" not in batch:
            raise ValueError(f"{steps} optimizer steps on one batch need column old_logp")
        self._engine.longest_row = 0
        self._encoder.prepare(media_of(batch["media"]))
        metrics: dict[str, list[float]] = defaultdict(list)
        of_mini = batch["mini"] if "mini" in batch or len(totals) > 1 else [0] * len(batch)
        minis = [
            batch.take(i for i, number in enumerate(of_mini) if number == m)
            for m in range(len(totals))
        ]
        for _ in range(self._actor.ppo_epochs):
            for mini, total in zip(minis, totals, strict=True):
                for name, value in self._step(mini, total, temperature).items():
                    metrics[name].append(value)
        known = "old_logp" in batch
        return dict(metrics), batch["old_logp"] if known else self._seen

    def _step(self, mini: DataProto, total: StepTotals, temperature: float) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        self._seen = []
        for micro in self._micro_batches(mini, self._actor.micro_batch_size_per_device_for_update):
            for name, value in self._accumulate(micro, total, temperature).items():
                sums[name] += value
        return dict(sums) | self._engine.optimizer_step()

    def _accumulate(
        self, micro: DataProto, total: StepTotals, temperature: float
    ) -> dict[str, float]:
        """Adds one micro-batch's gradient; returns its share of every metric."""
        logp_T, entropy_T = self._forward(micro, temperature)
        device = logp_T.device
        lengths = torch.tensor(
            [len(r) for r in micro["response_ids"]], dtype=torch.long, device=device
        )
        sequence_T = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        old_T = _flat(micro, "old_logp", device) if "old_logp" in micro else logp_T.detach()
        self._seen.extend(logp_T.detach().cpu().split(lengths.tolist()))
        advantage_B = torch.tensor(micro["advantage"], dtype=torch.float32, device=device)
        counts = {"n_tokens": total.n_tokens, "n_sequences": total.n_sequences}
        computed = max(
            1, total.n_tokens if total.n_computed_tokens is None else total.n_computed_tokens
        )
        weight_T, shares = None, {"entropy": entropy_T.detach().sum() / computed}
        if "rollout_logp" in micro:
            correction = rollout_correction(
                old_T, _flat(micro, "rollout_logp", device), sequence_T,
                self._algorithm.rollout_correction,
            )  # fmt: skip
            weight_T = correction.weight_T
            shares |= {f"correction_{k}": v / computed for k, v in correction.counts.items()}
        policy = policy_loss(
            logp_T, old_T, advantage_B, sequence_T, weight_T=weight_T,
            clip=self._clip, averaging=self._actor.loss_avg_mode, **counts,
        )  # fmt: skip
        loss = policy.loss
        shares |= policy.metrics | {"pg_loss": policy.loss.detach()}
        if "ref_logp" in micro:
            kl = kl_loss(
                logp_T, _flat(micro, "ref_logp", device), sequence_T,
                kind=self._algorithm.kl_penalty, averaging=self._actor.loss_avg_mode, **counts,
            )  # fmt: skip
            loss = loss + micro.meta["kl_coef"] * kl
            shares["kl_loss"] = kl.detach()
        self._engine.backward(loss)
        return {name: float(value) for name, value in shares.items()}

    def _forward(self, micro: DataProto, temperature: float) -> tuple[Tensor, Tensor]:
        """Targets of the micro-batch in the order of its samples, (T,) each."""
        if len(micro) == 0:
            return run_row(self._engine, self._encoder, dummy_row(), temperature)
        (row,) = response_rows(
            micro,
            self._engine.adapter,
            shared_prefix=self._actor.shared_prefix,
            packed=self._actor.padding_free,
        )
        return run_row(self._engine, self._encoder, row, temperature)


def run_row(
    engine: FSDPEngine, encoder: MediaEncoder, row: PackedRow, temperature: float
) -> tuple[Tensor, Tensor]:
    """Forward of one row, its media encoded in the pass only where the tower is trained."""
    if engine.tower_is_frozen or not torch.is_grad_enabled():
        features, vision = encoder.features(row.media), None
    else:
        features, vision = None, encoder.vision_input(row.media)
    return engine.forward(row, features_ME=features, vision=vision, temperature=temperature)


def _flat(batch: DataProto, column: str, device: torch.device) -> Tensor:
    return batch.flat(column)[0].to(device)
