"""The Ray-facing workers: one process a device holds all roles of its share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl.config import DataConfig, PPOConfig, SFTConfig
from verl.data.media import MediaCache
from verl.models.fingerprint import FeatureName
from verl.models.loader import save_assets
from verl.protocol import DataProto
from verl.sequence_parallel.topology import SequenceGroup
from verl.single_controller.decorator import Dispatch, dispatch
from verl.single_controller.worker import Worker
from verl.utils.checkpoint import read_shards, write_shards
from verl.utils.exits import UserError
from verl.workers.dp_actor import DataParallelActor, StepTotals
from verl.workers.encoder import MediaEncoder
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.generation import gathered
from verl.workers.media_stores import GIB, media_cache, media_counts, stored_features
from verl.workers.memory_plan import plan_memory
from verl.workers.rollouts import build_rollout, generate_together
from verl.workers.sft_engine import SFTRunner

logger = logging.getLogger(__name__)
LOWER_EXPERIENCE = (
    "lower worker.actor.micro_batch_size_per_device_for_experience (or "
    "worker.actor.max_tokens_per_device)"
)


@contextmanager
def fits_device(remedy: str) -> Iterator[None]:
    """Device memory that runs out in this block is a UserError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = str(error).partition(". ")[0]
        raise UserError(f"the memory of the GPU is too small ({what}); {remedy}") from error


class EngineWorker(Worker):
    """What every training worker has: a mesh, an engine, checkpoints, memory figures."""

    engine: FSDPEngine
    _cache: MediaCache
    _encoders: list[MediaEncoder]

    def make_encoder(
        self, engine: FSDPEngine, data: DataConfig, cached: str | None, num_chunk_seq: int = -1
    ) -> MediaEncoder:
        """An encoder on an engine's tower, with a store where the tower is frozen."""
        name, stored = engine.feature_name, None
        if name is not None:
            stored = stored_features(name, engine.adapter, data, cached, num_chunk_seq)
        encoder = MediaEncoder(engine, self._cache, stored)
        self._encoders.append(encoder)
        return encoder

    @dispatch(Dispatch.ALL)
    def feature_name(self) -> FeatureName | None:
        """What names the features that training reads; None where the tower is trained."""
        return self.engine.feature_name

    @dispatch(Dispatch.ALL)
    def media_counts(self) -> dict[str, int]:
        """Pieces of media decoded and encoded by this process so far."""
        return media_counts(self._cache, self._encoders)

    def make_mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.world_size,))

    @dispatch(Dispatch.ALL)
    def save_shards(self, folder: str) -> None:
        """Writes this rank's share of model, optimizer, schedule and RNG state into `folder`."""
        write_shards(Path(folder), self.engine.checkpoint_state(), self.engine.rank_state())

    @dispatch(Dispatch.ALL)
    def load_shards(self, folder: str) -> None:
        """Reads back what `save_shards` wrote, also from another number of workers."""
        rank_state = read_shards(Path(folder), self.engine.checkpoint_state())
        self.engine.restore(rank_state)

    @dispatch(Dispatch.ALL)
    def memory(self) -> dict[str, float]:
        """Peak memory, GiB: of the host process so far, of the device since the last call."""
        import resource

        peak = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
        if self.device.type == "cuda":
            peak["device_peak_gib"] = self.engine.peak_memory.take() / GIB
        return peak


class ActorRolloutRefWorker(EngineWorker):
    """Actor, rollout engine and reference model of one device."""

    def __init__(self, config: PPOConfig, total_steps: int, **worker: Any) -> None:
        super().__init__(**worker)
        self._config = config
        self._total_steps = total_steps

    @dispatch(Dispatch.ALL)
    def init_model(self) -> None:
        """Builds all roles. A collective: every rank must call it."""
        actor = self._config.worker.actor
        mesh = self.make_mesh()
        self._sequence = SequenceGroup.of_neighbours(actor.sequence_size, self.device.type)
        self.engine = FSDPEngine(
            actor.model, actor.fsdp, actor.offload, mesh,
            optim=actor.optim, total_steps=self._total_steps, max_grad_norm=actor.max_grad_norm,
            has_tower=actor.cached_embeds_dir is None, sequence=self._sequence,
        )  # fmt: skip
        self._cache, self._encoders = media_cache(self._config.data), []
        self._encoder = self._encoder_of(self.engine)
        self._actor = DataParallelActor(self.engine, self._encoder, actor, self._config.algorithm)
        self._reference = None
        if self._config.algorithm.needs_reference:
            self._reference = self._build_reference(mesh)
        rollout = self._config.worker.rollout
        self._engine_group = SequenceGroup.of_neighbours(
            rollout.tensor_parallel_size, self.device.type
        )
        self._rollout = build_rollout(
            rollout, actor.model, self._config.data, self.engine.adapter,
            self.engine.compute_dtype, self.engine.device,
        )  # fmt: skip
        # A checkpoint may be read before the first weights are sent.
        self._rest()

    def _rest(self) -> None:
        """The rollout engine gives its memory back until it is sent weights."""
        self._rollout.sleep()
        self.engine.peak_memory.sleeping(self._rollout.asleep_bytes())

    def _encoder_of(self, engine: FSDPEngine) -> MediaEncoder:
        worker = self._config.worker
        return self.make_encoder(
            engine, self._config.data, worker.actor.cached_embeds_dir, worker.rollout.num_chunk_seq
        )

    def _build_reference(self, mesh: DeviceMesh) -> DataParallelActor:
        actor, ref = self._config.worker.actor, self._config.worker.ref
        # With a frozen tower both models see the same features: the reference needs no tower.
        shared = self.engine.tower_is_frozen
        engine = FSDPEngine(
            actor.model, ref.fsdp, ref.offload, mesh,
            has_tower=not shared, sequence=self._sequence,
        )  # fmt: skip
        encoder = self._encoder if shared else self._encoder_of(engine)
        return DataParallelActor(engine, encoder, actor, self._config.algorithm)

    @dispatch(Dispatch.ALL)
    def sync_weights(self) -> None:
        """Hands the actor's weights to the rollout engine, one tensor at a time."""
        self.engine.peak_memory.sleeping(0)
        self._rollout.load_weights(self.engine.named_full_tensors())

    @dispatch(Dispatch.DP)
    @fits_device("lower worker.rollout.max_num_batched_tokens or data.video_max_pixels")
    def generate(self, prompts: DataProto) -> DataProto:
        """Samples for every prompt; see `verl.workers.generation.generate`."""
        own = prompts.split(self._sequence.size)[self._sequence.rank]
        output = generate_together(
            own, self.engine.adapter, self._encoder, self._rollout, self._engine_group
        )
        return gathered(output, self._sequence)

    @dispatch(Dispatch.DP)
    @fits_device(LOWER_EXPERIENCE)
    def log_probs(self, batch: DataProto) -> DataProto:
        """Column old_logp: log-probabilities under the current actor."""
        self._rest()
        return DataProto({"old_logp": self._actor.log_probs(batch, batch.meta["temperature"])})

    @dispatch(Dispatch.DP)
    @fits_device(LOWER_EXPERIENCE)
    def ref_log_probs(self, batch: DataProto) -> DataProto:
        """Column ref_logp: log-probabilities under the reference model."""
        assert self._reference is not None
        self._rest()
        return DataProto({"ref_logp": self._reference.log_probs(batch, batch.meta["temperature"])})

    @dispatch(Dispatch.DP)
    @fits_device(
        "lower worker.actor.micro_batch_size_per_device_for_update (or "
        "worker.actor.max_tokens_per_device), or set worker.actor.offload.offload_optimizer=true "
        "or worker.actor.offload.offload_activations=true"
    )
    def update_actor(self, batch: DataProto) -> dict[str, Any]:
        """Optimizer steps over this rank's share; `batch.meta["totals"]` has the global counts."""
        self._rest()
        totals = [StepTotals(*t) for t in batch.meta["totals"]]
        with self.engine.peak_memory.block():
            metrics, log_probs = self._actor.update(batch, totals, batch.meta["temperature"])
        return {"metrics": metrics, "log_probs": log_probs, "memory": self._memory_of_update()}

    def _memory_of_update(self) -> dict[str, float]:
        """GiB of the last update's peak, as measured and as estimated from its longest row."""
        if self.device.type != "cuda":
            return {}
        engine, actor = self.engine, self._config.worker.actor
        reference = self._config.worker.ref.offload if self._reference else None
        plan = plan_memory(
            engine.adapter.shape, actor.model, actor.fsdp, actor.offload,
            world=self.world_size, tokens=engine.longest_row, reference=reference,
            moment_bytes=actor.optim.moment_bytes, tower_parameters=engine.tower_parameters,
        )  # fmt: skip
        return {
            "update_peak_gib": engine.peak_memory.of_block / GIB,
            "update_estimated_gib": plan.peak / GIB,
        }

    @dispatch(Dispatch.ALL)
    def save_assets(self, folder: str) -> None:
        """Config, tokenizer and processor beside the shards, for merging."""
        if self.rank == 0:
            save_assets(self._config.worker.actor.model, Path(folder))


class SFTWorker(EngineWorker):
    """Supervised fine-tuning on one device."""

    def __init__(self, config: SFTConfig, total_steps: int, **worker: Any) -> None:
        super().__init__(**worker)
        self._config = config
        self._total_steps = total_steps

    @dispatch(Dispatch.ALL)
    def init_model(self) -> None:
        """Builds the engine. A collective: every rank must call it."""
        config = self._config
        self.engine = FSDPEngine(
            config.model, config.fsdp, config.offload, self.make_mesh(),
            optim=config.optim, total_steps=self._total_steps,
            max_grad_norm=config.optim.max_grad_norm, has_tower=config.cached_embeds_dir is None,
            sequence=SequenceGroup.of_neighbours(config.ulysses_size, self.device.type),
        )  # fmt: skip
        self._cache, self._encoders = media_cache(config.data), []
        encoder = self.make_encoder(self.engine, config.data, config.cached_embeds_dir)
        self._runner = SFTRunner(self.engine, encoder, config.batch)

    @dispatch(Dispatch.DP)
    @fits_device("lower batch.max_tokens_per_micro_batch, or set offload.offload_optimizer=true")
    def train_step(self, batch: DataProto) -> dict[str, float]:
        """One optimizer step over this rank's share of a batch."""
        return self._runner.train_step(batch, batch.meta["n_tokens"])

    @dispatch(Dispatch.DP)
    @fits_device("lower batch.max_tokens_per_micro_batch")
    def validation_loss(self, batch: DataProto) -> dict[str, float]:
        """Sum of target log-probabilities over this rank's share, and their count."""
        return self._runner.evaluate(batch)

    @dispatch(Dispatch.ALL)
    def save_assets(self, folder: str) -> None:
        """Config, tokenizer and processor beside the shards, for merging."""
        if self.rank == 0:
            save_assets(self._config.model, Path(folder))
