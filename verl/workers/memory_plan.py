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

    @property
    def peak(self) -> float:
        """Of backward's larger end, or of the optimizer step."""
        ends = max(self.kept, self.gradients + self.kept_of_one)
        backward = self.weights + self.optimizer + self.working + ends
        return max(backward, self.weights + self.gradients + self.moments)


def plan_memory(
    shape: TextShape,
    model: ModelConfig,
    fsdp: FSDPConfig,
    offload: OffloadConfig,
    *,
    world: int,
    tokens: int,
    moment_bytes: int = 2 * MASTER,
    reference: OffloadConfig | None = None,
) -> MemoryPlan:
    """For a row of which this device holds `tokens`, sharded over `world` devices.

    `moment_bytes` are AdamW's two moments a weight; `reference` says where a reference model lies,
    None that there is none. A vision tower and a rollout engine that is awake come on top.
    """
    count, state = shape.parameters, shape.hidden
    words = shape.vocab * state * (1 if shape.is_tied else 2)
    # Embedding and head stay gathered, with their gradient; of layers, one and the next.
    gathered = COMPUTE * 2 * words + COMPUTE * 3 * shape.layer_weights
    if not fsdp.enable_full_shard:
        gathered = COMPUTE * (count + words)
    on_device = 0 if offload.offload_params else MASTER * count / world
    moments = 0.0 if offload.offload_params else moment_bytes * count / world
    second = 0.0
    if reference is not None and not reference.offload_params:
        second = COMPUTE * count / world
    attention = shape.heads * shape.head_dim
    a_layer = COMPUTE * tokens * (state + attention * model.keep_attention)
    kept, layers = a_layer * shape.layers, shape.layers
    tile = tokens if model.mlp_tile_tokens < 0 else min(tokens, model.mlp_tile_tokens)
    if not model.enable_gradient_checkpointing:
        a_layer = COMPUTE * tokens * (WORKING_STATES * state + 3 * shape.mlp)
        kept, tile = a_layer * layers, tokens
    elif offload.offload_activations:
        kept = min(kept, 4 * a_layer)
    working = COMPUTE * (
        WORKING_STATES * tokens * max(state, attention) + WORKING_MLP * tile * shape.mlp
    )
    logits = LOGIT_COPIES * MASTER * CHUNK_ROWS * shape.vocab
    return MemoryPlan(
        weights=on_device + second + gathered,
        gradients=on_device,
        optimizer=0.0 if offload.offload_optimizer else moments,
        moments=moments,
        kept=kept,
        kept_of_one=a_layer,
        working=max(working, logits) + COMPUTE * 2 * tokens * state,
    )


def longest_row(actor: ActorConfig, n: int, max_prompt: int, max_response: int) -> int:
    """Most tokens of a row of an update; `n` responses a prompt."""
    if actor.max_tokens_per_device is not None:
        return max(actor.max_tokens_per_device, max_prompt + max_response)
    samples = actor.micro_batch_size_per_device_for_update if actor.padding_free else 1
    prompts = -(-samples // n) if actor.shares_prompts else samples
    return prompts * max_prompt + samples * max_response
