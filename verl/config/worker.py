"""The `worker.*` section: model, optimizer, sharding, actor, reference, rollout and reward."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from verl.config.base import Count, CountOrOff, NonNegative, NonNegativeInt, Positive, Range, Share


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and which parts of it."""

    model_path: str = ""
    """Folder in Hugging Face layout (config.json, safetensors, tokenizer), or a hub id."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer, and of the processor files where it holds any (else those
    of `model_path` count); null means `model_path`."""
    override_config: dict[str, Any] = field(default_factory=dict)
    """Entries of the model's config.json to replace, by name."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: load the weights; random: draw them, from config.json alone (for tests)."""
    enable_gradient_checkpointing: bool = True
    """Compute activations again in the backward pass: less memory, about a third more compute."""
    keep_attention: bool = True
    """With gradient checkpointing: keep each layer's attention output, so that backward need not
    compute it again. For long prompts attention is most of a layer; the price is one more hidden
    state a token and layer. Has no effect with attention by sdpa or flash_attn."""
    mlp_tile_tokens: CountOrOff = 16384
    """With gradient checkpointing: most tokens of a row for which a layer's MLP holds its wide
    activations at a time; -1: the whole row. Changes memory, not the result."""
    trim_last_layer: bool = True
    """Of tokens that predict nothing, such as a prompt's, let the last layer compute keys and
    values alone. Has no effect with attention by sdpa or flash_attn, nor with
    a `ulysses_size` above 1."""
    compile_pointwise: Literal["auto", "on", "off"] = "auto"
    """Join the norms, rotations, gates and sums of the language model's blocks by torch.compile:
    auto on CUDA where a C compiler is there; on also on a CPU, where it needs a C++ compiler."""
    freeze_vision_tower: bool = True
    """Do not train the vision tower, so that its features are computed once a video."""
    compile_vision_tower: Literal["auto", "on", "off"] = "auto"
    """On CUDA, compile the blocks of a frozen vision tower, which then encodes 2.5 times as fast
    (H100): auto where the tower has 100 million parameters or more and a C compiler is there."""
    trust_remote_code: bool = False
    """Let Python files in the model folder run. Leave it off for models you have not read."""
    attn_implementation: Literal[
        "auto", "sdpa", "flash", "cudnn", "flash3", "flash4", "flash_attn"
    ] = "auto"
    """Attention kernel: sdpa (torch, any device), flash (torch's FlashAttention, bf16 on
    CUDA GPUs of compute capability 8.0 or later; reads a shared prompt once), cudnn (the same, long
    sequences by cuDNN, twice as fast on an H100), flash3 and flash4 (flash, with the kernels of
    FlashAttention 3 or 4 in the place of torch's, where their package is installed), flash_attn
    (the package flash-attn, with the keys of a shared prompt repeated for each response); auto
    takes cudnn from compute capability 9.0 on, else flash where it can run, else sdpa."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    lr: NonNegative = 1e-6
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay; norms and biases are left out."""
    strategy: Literal["adamw"] = "adamw"
    """Optimizer."""
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of AdamW's two moments; bf16 halves their memory, with stochastic rounding."""
    warmup_style: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after warm-up: stay, or fall to `min_lr_ratio` by a cosine or a straight line."""
    lr_warmup_ratio: Share = 0.0
    """Share of all optimizer steps that warms up from 0. Not together with lr_warmup_steps."""
    lr_warmup_steps: NonNegativeInt | None = None
    """Optimizer steps that warm up from 0; null means by `lr_warmup_ratio`."""
    min_lr_ratio: Share = 0.0
    """Where cosine and linear end, as a share of `lr`."""

    @property
    def moment_bytes(self) -> int:
        """Of both moments of a weight."""
        return 4 if self.moment_dtype == "bf16" else 8


@dataclass(frozen=True, kw_only=True)
class FSDPConfig:
    """How parameters are sharded over the workers, and in which precision they compute."""

    enable_full_shard: bool = True
    """true: free gathered parameters after each forward; false: keep them until the backward."""
    mp_param: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of compute (master weights are fp32); auto is bf16 on CUDA and fp32 on the CPU."""
    mp_reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are summed over the workers."""


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """What is kept in host memory while it is not in use."""

    offload_params: bool = False
    """Parameters and their optimizer live in host memory; blocks are copied to the device as they
    are needed, and AdamW runs on the CPU (then `offload_optimizer` changes nothing)."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory between optimizer steps."""
    offload_activations: bool = False
    """With gradient checkpointing: what backward needs of each layer waits in pinned host memory,
    copied beside the computation. For prompts whose checkpoints do not fit the GPU; no effect on a
    CPU."""


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """The policy that is trained, and its loss."""

    global_batch_size: Count = 128
    """Prompts an optimizer step (each with its `worker.rollout.n` responses), over all workers."""
    micro_batch_size_per_device_for_update: Count = 4
    """Samples a forward and backward pass on one worker. Changes memory, never the gradient."""
    micro_batch_size_per_device_for_experience: Count = 16
    """Samples a forward pass on one worker when log-probs are computed."""
    max_tokens_per_device: Count | None = None
    """Fill passes by tokens instead: neighbouring samples share one as long as no worker holds more
    tokens of it than this, a shared prompt counted once. A group of responses that is larger is cut
    into parts, each with its prompt. Then the two sizes above do not count; null: they do."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    clip_ratio_low: Share = 0.2
    """The probability ratio is clipped below at 1 - this."""
    clip_ratio_high: NonNegative = 0.3
    """The probability ratio is clipped above at 1 + this."""
    clip_ratio_dual: Annotated[float, Range(gt=1)] = 3.0
    """Dual clip: bound of the ratio where the advantage is negative."""
    loss_avg_mode: Literal["token", "seq"] = "token"
    """token: mean over all response tokens; seq: mean over responses of their token means."""
    ppo_epochs: Count = 1
    """Passes over a rollout batch."""
    old_log_probs: Literal["auto", "always"] = "auto"
    """Log-probs of the policy that sampled, by a pass of their own. auto: only where something
    reads them: with several optimizer steps a rollout batch, or the KL in the reward. With one step
    the update's own pass has them, since the ratio is 1."""
    zero_advantage_groups: Literal["auto", "train"] = "auto"
    """Groups of which no sample has an advantage. auto: they are left out of the update where
    nothing else gives them a gradient, which is where there is no KL in the loss; they count in all
    means of the loss, so the step is the same, are left out of `actor/entropy` and `mismatch/*`,
    and count as zero in other metrics of the actor. train: they are computed all the same."""
    padding_free: bool = True
    """true: sequences are packed end to end into one row a micro-batch; false: each sequence is a
    forward pass of its own. The result is the same."""
    shared_prefix: bool = True
    """Compute the prompt of a group of responses once instead of once a response. Sequences
    on their own (`padding_free=false`) never share it."""
    ulysses_size: Count | Literal["auto"] = 1
    """Workers that share each sequence in training (Ulysses): a worker holds its part of the tokens
    outside of attention, and of the heads within it. For sequences that do not fit one device,
    since it costs time; must divide the model's attention heads and the number of workers. auto:
    the smallest size with which the longest row is estimated to fit the GPU; 1 on CPUs."""
    cached_embeds_dir: str | None = None
    """Folder with the embeddings of all media, made beforehand by `python3 -m
    verl.utils.cache_video_embeds_vila` (it prints the setting): the vision tower is not loaded, and
    no video or image is decoded or needs to be there. Media that it lacks are unusable rows. null:
    the tower makes what `data.cache_dir` lacks."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)

    @property
    def sequence_size(self) -> int:
        """`ulysses_size`; 1 while it is auto."""
        return 1 if self.ulysses_size == "auto" else self.ulysses_size

    @property
    def shares_prompts(self) -> bool:
        """Whether samples of a prompt compute it once."""
        return self.shared_prefix and self.padding_free


@dataclass(frozen=True, kw_only=True)
class RefConfig:
    """The frozen reference model; everything else is as in the actor."""

    fsdp: FSDPConfig = field(default_factory=FSDPConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled."""

    name: Literal["auto", "vllm", "hf"] = "auto"
    """Rollout engine: vllm (in the workers' own processes), or hf, which is built in: transformers
    with a KV cache. auto: vllm on GPUs where it is installed, else hf."""
    n: Count = 5
    """Responses a prompt: the size of a GRPO group."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with this probability; 1 means all."""
    top_k: CountOrOff = -1
    """Sample from so many likeliest tokens; -1 means all."""
    seed: int = 1
    """Seed of sampling; each response's own seed follows from it, the step and the prompt."""
    max_num_batched_tokens: Count | None = None
    """With vllm: most tokens of one forward pass; null: 16384. With hf: most tokens whose keys and
    values are held at once, which bounds memory: a prompt counts once, and each of its n responses
    with the whole of `data.max_response_length`. As many prompts as fit run together; of one that
    does not fit, as many responses as fit, at least one. null: 16384, or the longest prompt with
    all of its responses where that is more."""
    tensor_parallel_size: Count = 1
    """With vllm: neighbouring workers that hold one copy of the model together; must divide the
    number of workers and the model's attention heads."""
    gpu_memory_utilization: Annotated[float, Range(gt=0, le=1)] | None = None
    """With vllm: share of a GPU's memory for the engine's weights, keys and values while it
    generates; what training left on the GPU comes on top. null: 0.6, or what training leaves where
    that is less."""
    max_num_seqs: Count = 256
    """With vllm: most responses that are decoded at once."""
    max_model_len: Count | None = None
    """With vllm: most tokens of a prompt and its response; null: `data.max_prompt_length` +
    `data.max_response_length`."""
    enforce_eager: bool = False
    """With vllm: decode without CUDA graphs, which are recorded when the engine starts."""
    enable_chunked_prefill: bool = True
    """With vllm: let a prompt's forward pass be cut where `max_num_batched_tokens` is reached.
    false: that must hold the longest prompt and its response. CPUs never cut."""
    limit_images: NonNegativeInt = 0
    """With vllm: most images of a prompt; 0: any number."""
    num_chunk_seq: CountOrOff = -1
    """Parts in which a worker's embeddings of a video are gathered from it when all workers encode
    together: more parts take less memory and more time. -1: as few as the free memory of the
    fullest machine allows."""
    ignore_eos: bool = False
    """Go on to the full length after an end token (for benchmarks)."""
    val_override_config: dict[str, Any] = field(default_factory=dict)
    """Sampling for validation: any of temperature, top_p, top_k, n, in place of those above."""

    def tokens_at_once(self, max_prompt_length: int, max_response_length: int) -> int:
        """`max_num_batched_tokens`, or what null stands for with these lengths and `hf`."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(16_384, max_prompt_length + self.n * max_response_length)

    def for_validation(self) -> RolloutConfig:
        """The same engine with the sampling settings of `val_override_config`."""
        return replace(self, **self.val_override_config, val_override_config={})


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The function that scores responses."""

    reward_function: str = ""
    """The function as `path/to/file.py:name`."""
    reward_type: Literal["batch", "sequential"] = "batch"
    """batch: called once with the list of all responses of a step, or of one round of validation;
    sequential: called for each response."""
    reward_function_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments that are passed to the function."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text that is scored."""
    num_cpus: Count = 1
    """Processes that score at the same time with `sequential`. A `batch` function sees all of the
    responses together and so has one process: more of them are an error."""
    timeout_s: Positive = 60.0
    """Longest time in seconds that one call of the function may take: a response with `sequential`,
    all responses of a call with `batch`, also those of a whole validation file. Then the run stops
    with the reason."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """The roles of a worker process."""

    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
