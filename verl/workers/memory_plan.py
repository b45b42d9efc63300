"""How much device memory an update takes, by what it is made of; an estimate before the step.

Backward frees checkpoints layer by layer while gradients appear, so the peak is at one of its ends:
with all checkpoints and the first gradients, or with all gradients and the last checkpoints.
Letters: T tokens of a row on one device, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl.config import ActorConfig, FSDPConfig, ModelConfig, OffloadConfig
from verl.models.logprobs import CHUNK_ROWS
from verl.models.shape import TextShape

MASTER, COMPUTE = 4, 2
"""Bytes of a weight, of its gradient and of a moment in float32, and of an activation in bf16."""
WORKING_STATES = 10
"""Hidden states a token that one layer's backward holds: norms, queries, their gradients and sums.
Measured with Qwen2.5-VL-3B on an H100 (docs/performance.md)."""
FORWARD_STATES = 8
"""Hidden states a token that a layer holds without gradients."""
WORKING_MLP = 6
"""Rows of the MLP's width a token of a tile: gate, up, their product and their gradients."""
LOGIT_COPIES = 4
"""Float32 copies of a chunk's logits in its backward."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device while a row goes through an update."""

    weights: float
    """Shards of the master weights and of the reference, and what is gathered of them."""
    gradients: float
    optimizer: float
    """Moments that stay."""
    moments: float
    """All moments, of which the optimizer step has need."""
    kept: float
    """What checkpointing keeps of all layers."""
    kept_of_one: float
    working: float
    """What the layer that is computed needs beside it."""
    forward: float
    """What a pass without gradients holds, such as that of the reference."""

    @property
    def peak(self) -> float:
        """Of backward's larger end, of the optimizer step, or of a pass without gradients."""
        ends = max(self.kept, self.gradients + self.kept_of_one)
        resident = self.weights + self.optimizer
        step = self.weights + self.gradients + self.moments
        return max(resident + self.working + ends, step, resident + self.forward)


def plan_memory(
    shape: TextShape,
    model: ModelConfig,
    fsdp: FSDPConfig,
    offload: OffloadConfig,
    *,
    world: int,
    tokens: int,
    forward_tokens: int = 0,
    moment_bytes: int = 2 * MASTER,
    reference: OffloadConfig | None = None,
    tower_parameters: int = 0,
) -> MemoryPlan:
    """For a row of which this device holds `tokens`, sharded over `world` devices.

    `forward_tokens` is the longest row of a pass without gradients; `moment_bytes` are AdamW's two
    moments a weight; `reference` says where a reference model lies, None that there is none;
    `tower_parameters` are those of a vision tower that is loaded: whole on every device where it
    is frozen. A rollout engine that is awake comes on top, and so does a trained tower's own work.
    """
    half = MASTER if fsdp.mp_param == "fp32" else COMPUTE
    count, state = shape.parameters, shape.hidden
    frozen_tower = half * tower_parameters if model.freeze_vision_tower else 0
    if not model.freeze_vision_tower:
        count += tower_parameters
    words = shape.vocab * state * (1 if shape.is_tied else 2)
    # Embedding and head stay gathered, with their gradient; of layers, one and the next.
    gathered = half * 2 * words + half * 3 * shape.layer_weights
    if not fsdp.enable_full_shard:
        gathered = half * (count + words)
    on_device = 0 if offload.offload_params else MASTER * count / world
    moments = 0.0 if offload.offload_params else moment_bytes * count / world
    second = 0.0
    if reference is not None and not reference.offload_params:
        second = half * shape.parameters / world
    logits = LOGIT_COPIES * MASTER * CHUNK_ROWS * shape.vocab
    kept, kept_of_one = _kept(shape, model, offload, tokens)
    work = half * _working(shape, model, tokens)
    return MemoryPlan(
        weights=on_device + second + gathered + frozen_tower,
        gradients=on_device,
        optimizer=0.0 if offload.offload_optimizer else moments,
        moments=moments,
        kept=half * kept,
        kept_of_one=half * kept_of_one,
        working=max(work, logits) + half * 2 * tokens * state,
        forward=max(half * _forward(shape, model, forward_tokens), logits * (forward_tokens > 0)),
    )


# What follows counts numbers, not bytes.


def _kept(
    shape: TextShape, model: ModelConfig, offload: OffloadConfig, tokens: int
) -> tuple[int, int]:
    """What all layers keep on the device for backward, and what one of them does."""
    if not model.enable_gradient_checkpointing:
        of_one = tokens * (WORKING_STATES * shape.hidden + 3 * shape.mlp)
        return of_one * shape.layers, of_one
    of_one = tokens * (shape.hidden + shape.heads * shape.head_dim * model.keep_attention)
    layers = min(shape.layers, 4) if offload.offload_activations else shape.layers
    return of_one * layers, of_one


def _working(shape: TextShape, model: ModelConfig, tokens: int) -> float:
    """What backward of the layer that is computed holds beside what was kept."""
    tile = _tile(model, tokens) if model.enable_gradient_checkpointing else tokens
    return WORKING_STATES * tokens * _width(shape) + WORKING_MLP * tile * shape.mlp


def _forward(shape: TextShape, model: ModelConfig, tokens: int) -> float:
    """What a layer holds in a pass without gradients."""
    mlp = WORKING_MLP / 2 * _tile(model, tokens) * shape.mlp
    return FORWARD_STATES * tokens * _width(shape) + mlp


def _width(shape: TextShape) -> int:
    return max(shape.hidden, shape.heads * shape.head_dim)


def _tile(model: ModelConfig, tokens: int) -> int:
    return tokens if model.mlp_tile_tokens < 0 else min(tokens, model.mlp_tile_tokens)


def longest_row(
    actor: ActorConfig, n: int, max_prompt: int, max_response: int, samples: int | None = None
) -> int:
    """Most tokens of a row; `n` responses a prompt.

    `samples` a pass are those of an update if not given. Groups about one video that share it
    (`data.group_by_video`) take less than is counted here.
    """
    if actor.max_tokens_per_device is not None and actor.padding_free:
        return max(actor.max_tokens_per_device * actor.sequence_size, max_prompt + max_response)
    samples = samples or actor.micro_batch_size_per_device_for_update
    if not actor.padding_free:
        samples = 1
    # Groups are not begun where they do not fit whole (`verl.workers.batches.micro_batches`).
    prompts = max(1, samples // n) if actor.shares_prompts else samples
    if actor.shares_prompts:
        samples = min(samples, prompts * n)
    return prompts * max_prompt + samples * max_response
