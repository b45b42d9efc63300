"""One FSDP2 engine for actor, reference and supervised fine-tuning.

gloo on the CPU and NCCL on CUDA run the same code. Master weights are float32 and sharded; compute
is bf16 on CUDA. FSDP averages gradients over ranks, so a loss that is normalised by a global count
must be multiplied by the world size before backward: `backward` does that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from verl.config import FSDPConfig, ModelConfig, OffloadConfig, OptimConfig
from verl.models.adapter import Adapter
from verl.models.fingerprint import FeatureName, feature_name
from verl.models.loader import build_model, load_adapter, materialize
from verl.models.pointwise import Pointwise
from verl.models.policy import PolicyModel, VisionInput
from verl.models.tiled_mlp import tile_mlps
from verl.models.tower import tower_names, tower_weights
from verl.models.tower_compile import compile_tower
from verl.sequence_parallel.attention import (
    ATTENTION,
    AttentionContext,
    attention_over,
    register_attention,
)
from verl.sequence_parallel.flash import kernel_of
from verl.sequence_parallel.kept import KeptAttention
from verl.sequence_parallel.layout import Layout
from verl.sequence_parallel.packing import PackedRow
from verl.sequence_parallel.shard import gather_targets, pad_row, shard_of
from verl.sequence_parallel.tail import Tail, tail_of
from verl.sequence_parallel.topology import SequenceGroup
from verl.sequence_parallel.tree import KERNELS as TREE_KERNELS
from verl.sequence_parallel.ulysses import UlyssesAttention
from verl.utils.device_memory import PeakMemory
from verl.utils.host_stash import HostStash
from verl.utils.manifest import CheckpointError
from verl.utils.recompute import checkpoint_contexts
from verl.utils.shards import AbsentTensors
from verl.utils.torch_functional import clip_and_check
from verl.workers.optimizer import build_optimizer, build_schedule

logger = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class FSDPEngine:
    """A sharded policy model with its optimizer and schedule, or without them for a reference."""

    def __init__(
        self,
        model: ModelConfig,
        fsdp: FSDPConfig,
        offload: OffloadConfig,
        mesh: DeviceMesh,
        *,
        optim: OptimConfig | None = None,
        total_steps: int = 0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        has_tower: bool = True,
        sequence: SequenceGroup | None = None,
    ) -> None:
        """`has_tower=False` loads no vision tower: for a frozen one whose features are stored.

        The ranks of `sequence` share every row: they call `forward` with the same one.
        """
        self.device = torch.device(
            "cuda", torch.cuda.current_device()
        ) if mesh.device_type == "cuda" else torch.device("cpu")  # fmt: skip
        self.mesh = mesh
        self.world_size = mesh.size()
        self._sequence = sequence or SequenceGroup.alone()
        self.trainable = optim is not None
        self.compute_dtype = self._compute_dtype(fsdp)
        self.adapter: Adapter = load_adapter(model)
        # A text-only model has no tower to train, and nothing to run on ranks without media.
        can_see = self.adapter.vision is not None
        self.tower_is_frozen = model.freeze_vision_tower or not (self.trainable and can_see)
        self.has_tower = has_tower and can_see
        self._model = model
        self._offload = offload
        self._max_grad_norm = max_grad_norm
        self._checkpointing = model.enable_gradient_checkpointing and self.trainable
        self._attention = kernel_of(model.attn_implementation, self.device, self.compute_dtype)
        register_attention()
        self.policy = self._build(model, fsdp, seed)
        self.skipped_steps = 0
        self.peak_memory = PeakMemory(self.device)
        self.longest_row = 0
        """Most tokens of a row that this device held since this was last set to 0."""
        if optim is not None:
            # Asked for now: a checkpoint that is read later may bring another tower.
            self._tower_name = self.feature_name.weights if self.feature_name else None
            self._moment_dtype = optim.moment_dtype
            self.optimizer = build_optimizer(self.policy, optim)
            self.schedule = build_schedule(self.optimizer, optim, total_steps)

    def _compute_dtype(self, fsdp: FSDPConfig) -> torch.dtype:
        if fsdp.mp_param == "auto":
            return torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return DTYPES[fsdp.mp_param]

    @cached_property
    def feature_name(self) -> FeatureName | None:
        """What names the tower's features; None for a tower that changes, and without one."""
        if not self.tower_is_frozen or self.adapter.vision is None:
            return None
        return feature_name(
            self._model, self.adapter, self.policy.hf, self.compute_dtype, has_tower=self.has_tower
        )

    def _build(self, model: ModelConfig, fsdp: FSDPConfig, seed: int) -> PolicyModel:
        """Loads the weights on rank 0 alone and broadcasts them shard by shard."""
        owner = dist.get_rank() == 0
        dtype = torch.float32 if self.trainable else self.compute_dtype
        hf: Any = build_model(
            model, dtype=dtype, attention=ATTENTION, materialize=owner, seed=seed,
            tower=self.has_tower,
        )  # fmt: skip
        weights = hf.state_dict() if owner else {}
        materialize(hf, torch.device("cpu"))
        ops = Pointwise.chosen(model.compile_pointwise, self.device)
        self._can_trim = self.adapter.use_packed_blocks(hf, ops)
        if self._checkpointing:
            hf.gradient_checkpointing_enable(
                {"use_reentrant": False, "context_fn": checkpoint_contexts}
            )
        # Without a backward pass tiles cost nothing.
        if model.mlp_tile_tokens > 0 and (self._checkpointing or not self.trainable):
            layers = self.adapter.decoder_layers(hf)
            tile_mlps([self.adapter.mlp(layer) for layer in layers], model.mlp_tile_tokens)
        policy = PolicyModel(hf, self.adapter)
        policy.train(self.trainable).requires_grad_(self.trainable)
        tower = self.adapter.vision_tower(hf)
        if tower is not None and self.tower_is_frozen:
            tower.requires_grad_(False).eval()
        self._shard(policy, fsdp)
        if tower is not None and self.tower_is_frozen:
            # Sharding moved the other parameters; loading wants all of them in one place.
            tower.to("cpu" if self._offload.offload_params else self.device)
        set_model_state_dict(
            policy.hf,
            weights,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        if tower is not None and self.tower_is_frozen:
            self._place_tower(hf, tower)
        policy.forbidden_ids = policy.forbidden_ids.to(self.device)
        return policy

    def _place_tower(self, hf: nn.Module, tower: nn.Module) -> None:
        """A frozen tower lies on the device and has the compute dtype, also in a checkpoint.

        bf16 weights, as they are published, lose nothing by that; a checkpoint of a tower that was
        published in float32 holds it rounded where compute is bf16, and so does its merge.
        """
        tower.to(self.device)
        # Parameters only: rounded rotary frequencies would be another tower than transformers'.
        for p in tower.parameters():
            p.data = p.data.to(self.compute_dtype)
        compile_tower(self.adapter, hf, self.device, self._model.compile_vision_tower)

    def _shard(self, policy: PolicyModel, fsdp: FSDPConfig) -> None:
        """Shards each block, then the rest; a frozen tower is replicated."""
        tower = self.adapter.vision_tower(policy.hf)
        policy_offload: OffloadPolicy = OffloadPolicy()
        if self._offload.offload_params:
            policy_offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        kwargs: dict[str, Any] = {
            "mesh": self.mesh,
            "reshard_after_forward": fsdp.enable_full_shard,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=self.compute_dtype,
                reduce_dtype=DTYPES[fsdp.mp_reduce],
                cast_forward_inputs=False,
            ),
            "offload_policy": policy_offload,
        }
        for layer in self.adapter.decoder_layers(policy.hf):
            fully_shard(layer, **kwargs)
        ignored: set[nn.Parameter] = set()
        if tower is not None and self.tower_is_frozen:
            ignored = set(tower.parameters())
        elif tower is not None:
            fully_shard(tower, **kwargs)
        fully_shard(policy, ignored_params=ignored, **kwargs)
        if not self.tower_is_frozen:
            register_fsdp_forward_method(policy, "encode")

    def checkpoint_state(self) -> dict[str, Any]:
        """The stateful objects of a checkpoint, for `verl.utils.checkpoint`."""
        absent = None
        if not self.has_tower and self.adapter.vision is not None:
            names = tower_names(self._model)
            absent = AbsentTensors(names, lambda: tower_weights(self._model, self.compute_dtype))
        return {
            "model": self.policy.hf,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "absent": absent,
        }

    def rank_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this rank beside tensors."""
        return {
            "skipped_steps": self.skipped_steps,
            "tower": self._tower_name,
            "moments": self._moment_dtype,
        }

    def restore(self, rank_state: Mapping[str, Any]) -> None:
        """Takes back what `rank_state` gave.

        Raises CheckpointError for a checkpoint with another frozen tower than the model folder's:
        features stored under the name of one would be those of the other.
        """
        saved = rank_state.get("tower")
        if saved is not None and saved != self._tower_name:
            raise CheckpointError(
                f"the checkpoint's vision tower ({saved[:12]}) is not that of model_path="
                f"{self._model.model_path} ({str(self._tower_name)[:12]}): the model folder has "
                "changed since the run started, or the precision of compute has; restore it, or "
                "start anew with another trainer.save_checkpoint_path"
            )
        moments = rank_state.get("moments", "fp32")
        if moments != self._moment_dtype:
            raise CheckpointError(
                f"the checkpoint's optimizer has moments in {moments}, but optim.moment_dtype="
                f"{self._moment_dtype}; go on with optim.moment_dtype={moments}, or start anew "
                "with another trainer.save_checkpoint_path"
            )
        self.skipped_steps = int(rank_state["skipped_steps"])
        self._move_optimizer(torch.device("cpu"))  # moments were read to where parameters are

    def forward(
        self,
        row: PackedRow,
        *,
        features_ME: Tensor | None,
        vision: VisionInput | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the row's targets, (T,) each.

        With a sequence group the layers run on this rank's piece of the row, and every rank gets
        the values of all targets.
        """
        shard = None
        if self._sequence.size > 1:
            row = pad_row(row, self._sequence.size, self._pad_id)
            shard = shard_of(row, self._sequence, self.device)
        self.longest_row = max(self.longest_row, len(row.ids_S) // self._sequence.size)
        tail = self._tail_of(row)
        row = row.to(self.device)
        predict_T, labels_T = row.predict_T, row.labels_T
        if tail is not None:
            predict_T = tail.predict_T
        if shard is not None:
            predict_T, labels_T = shard.predict_local, labels_T[shard.own_T]
        stash = None
        if self._checkpointing and self._offload.offload_activations and torch.is_grad_enabled():
            stash = HostStash(self.device)
        context = self._attention_of(row.layout, stash, tail)
        if features_ME is not None:
            features_ME = features_ME.to(self.device, self.compute_dtype)
        with stash.saves() if stash is not None else nullcontext():
            found = self.policy(
                row.ids_S,
                row.positions_3S,
                predict_T,
                labels_T,
                features_ME=features_ME,
                vision=vision,
                attention_context=context,
                temperature=temperature,
                tokens=shard.tokens if shard is not None else None,
                tail_R=tail.rows_R if tail is not None else None,
            )
        if shard is None:
            return found
        logp_T, entropy_T = gather_targets(found, shard)
        return logp_T, entropy_T.detach()

    @property
    def _pad_id(self) -> int:
        """A word that is no medium."""
        return next(i for i in range(len(self.adapter.forbidden_ids) + 1)
                    if i not in self.adapter.forbidden_ids)  # fmt: skip

    def _tail_of(self, row: PackedRow) -> Tail | None:
        """What the last layer computes whole; `row` is on the host.

        Not with a sequence group: the tail would be on its last rank alone.
        """
        is_cut = self._model.trim_last_layer and self._can_trim
        if not is_cut or self._attention not in TREE_KERNELS or self._sequence.size > 1:
            return None
        return tail_of(row, self.device)

    def _attention_of(
        self, layout: Layout, stash: HostStash | None, tail: Tail | None
    ) -> AttentionContext:
        keeps = self._checkpointing and self._model.keep_attention
        context: AttentionContext
        cut = tail.layout if tail is not None else None
        if keeps and self._attention in TREE_KERNELS:
            context = KeptAttention(layout, self._attention, stash, cut)
        else:
            context = attention_over(layout, self.device, self._attention, cut)
        return context if self._sequence.size == 1 else UlyssesAttention(context, self._sequence)

    @torch.no_grad()
    def encode(self, pixels: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Visual features, (M, E). A collective where the tower is trained, hence sharded."""
        # A frozen tower is whole on every rank, and ranks call it as often as they have new media:
        # the hooks of a sharded forward pass would make them wait for each other.
        run = self.policy.vision_features if self.tower_is_frozen else self.policy.encode
        return run(pixels.to(self.device), grids)

    @property
    def tower_parameters(self) -> int:
        """Of a vision tower that is loaded."""
        tower = self.adapter.vision_tower(self.policy.hf)
        return sum(p.numel() for p in tower.parameters()) if tower and self.has_tower else 0

    @property
    def sequence_size(self) -> int:
        """Ranks that share each row."""
        return self._sequence.size

    def backward(self, loss: Tensor) -> None:
        """Backward of a loss that is this rank's share of a global sum."""
        (loss * self.world_size).backward()

    def optimizer_step(self) -> dict[str, float]:
        """Clips and steps on all ranks alike; a non-finite norm skips the step and is counted."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        norm, finite = clip_and_check(parameters, self._max_grad_norm)
        lr = self.optimizer.param_groups[0]["lr"]
        if finite:
            self._move_optimizer(self.device)
            self.optimizer.step()
            self._move_optimizer(torch.device("cpu"))
            self.schedule.step()
        else:
            self.skipped_steps += 1
            logger.warning("gradient norm is %s: step skipped on all ranks", norm)
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": lr, "skipped_steps": float(self.skipped_steps)}

    def _move_optimizer(self, device: torch.device) -> None:
        if not self._offload.offload_optimizer or self.device.type == "cpu":
            return
        if self._offload.offload_params:
            return  # parameters live on the CPU, and so does their optimizer state
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    state[key] = value.to(device)

    def named_full_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(transformers name, whole tensor) one at a time; every rank must iterate to the end.

        A frozen tower is left out, since it never changes. Tied weights appear under both names.
        """
        frozen = self._frozen_tower_names()
        for name, value in self.policy.hf.state_dict().items():
            if name in frozen:
                continue
            whole = value.to(self.device)
            if isinstance(whole, DTensor):
                whole = whole.full_tensor()
            yield name, whole.to(self.compute_dtype)

    def _frozen_tower_names(self) -> set[str]:
        tower = self.adapter.vision_tower(self.policy.hf)
        if tower is None or not self.tower_is_frozen:
            return set()
        own = {id(p) for p in tower.parameters()}
        return {n for n, p in self.policy.hf.named_parameters() if id(p) in own}
