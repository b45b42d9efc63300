"""Supervised steps on an engine: loss on the masked tokens of whole sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verl.config import SFTBatchConfig
from verl.data.sft_dataset import pack as bin_pack
from verl.protocol import DataProto
from verl.sequence_parallel.packing import PackedRow
from verl.workers.batches import equal_count, target_rows
from verl.workers.dp_actor import run_row
from verl.workers.encoder import MediaEncoder
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.media_stores import media_of


class SFTRunner:
    """Cross-entropy of target tokens: sum of -log p over the global number of targets."""

    def __init__(self, engine: FSDPEngine, encoder: MediaEncoder, batch: SFTBatchConfig) -> None:
        self._engine = engine
        self._encoder = encoder
        self._batch = batch

    def train_step(self, batch: DataProto, n_tokens: int) -> dict[str, float]:
        """One optimizer step; `n_tokens` counts the targets of the step over all ranks."""
        self._encoder.prepare(media_of(batch["media"]))
        total = 0.0
        for row in self._rows(batch):
            logp_T, _ = run_row(self._engine, self._encoder, row, 1.0)
            loss = -logp_T.sum() / n_tokens
            self._engine.backward(loss)
            total += float(loss.detach())
        return {"loss": total} | self._engine.optimizer_step()

    @torch.no_grad()
    def evaluate(self, batch: DataProto) -> dict[str, float]:
        """This rank's sum of -log p over targets, and their number."""
        self._encoder.prepare(media_of(batch["media"]))
        total, count = 0.0, 0
        for row in self._rows(batch):
            logp_T, _ = run_row(self._engine, self._encoder, row, 1.0)
            total -= float(logp_T.sum())
            count += len(logp_T)
        return {"loss_sum": total, "n_tokens": float(count)}

    def _rows(self, batch: DataProto) -> list[PackedRow]:
        bins: Sequence[Sequence[int]] = [[i] for i in range(len(batch))]
        if self._batch.packing:
            lengths = [len(ids) for ids in batch["input_ids"]]
            bins = bin_pack(lengths, self._batch.max_tokens_per_micro_batch)
        rows = target_rows(batch, self._engine.adapter, bins)
        return equal_count(rows, self._engine.device)
