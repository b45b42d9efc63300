"""Keys that EasyR1 and Long-RL users know and this version does not have, with what to do."""

from __future__ import annotations

from fnmatch import fnmatchcase

_VILA = "belongs to VILA models, which are not part of this version; remove it"
_OMNI = "belongs to audio models, which are not part of this version; remove it"
_DIFFUSION = "belongs to image and video generation, which is not part of this version; remove it"
_FILTER = "belongs to online filtering (DAPO), which is not part of this version; remove it"
_CRITIC = "belongs to a critic; the only estimator of this version is grpo, which has none"
_FAMILY = "the family of a model is read from its config.json; remove the key"
_PRECISION = "is always fp32 for master weights; set worker.actor.fsdp.mp_param for compute"

HINTS: dict[str, str] = {
    "worker.hybrid_engine": "actor and rollout always share their devices; remove it",
    "worker.critic*": _CRITIC,
    "trainer.critic_warmup": _CRITIC,
    "algorithm.gamma": _CRITIC,
    "algorithm.lam": _CRITIC,
    "algorithm.online_filtering": _FILTER,
    "algorithm.filter_*": _FILTER,
    "data.mini_rollout_batch_size": _FILTER,
    "trainer.max_try_make_batch": _FILTER,
    "*.vila_model": _FAMILY,
    "*.is_omni": _FAMILY,
    "*.diffusion": _DIFFUSION,
    "*.guidance_scale": _DIFFUSION,
    "*.scheduler": _DIFFUSION,
    "worker.rollout.resolution": _DIFFUSION,
    "worker.rollout.num_steps": _DIFFUSION,
    "worker.rollout.kl_reward": _DIFFUSION,
    "worker.rollout.num_frames": "frames of a video are data.num_video_frames",
    "worker.rollout.num_video_frames": "frames of a video are data.num_video_frames",
    "worker.rollout.height": _DIFFUSION,
    "worker.rollout.width": _DIFFUSION,
    "*.audio_max_length": _OMNI,
    "worker.rollout.disable_log_stats": "vLLM's statistics are never printed; remove it",
    "worker.rollout.disable_tqdm": "vLLM's progress bars are never shown; remove it",
    "worker.rollout.dtype": "the engine computes in worker.actor.fsdp.mp_param; remove it",
    "worker.rollout.tokens_per_frame": "tokens are counted from the video's own size; set "
    "data.video_max_pixels to bound them",
    "worker.rollout.group_frames": _VILA,
    "worker.rollout.max_frames_vllm": _VILA,
    "worker.rollout.bs_vllm": "prompts of a step are sent to vLLM together; set "
    "worker.rollout.max_num_seqs to bound what runs at once",
    "worker.rollout.padding_free": "set worker.actor.padding_free",
    "worker.rollout.use_cached_embeds": "embeddings are always kept in data.cache_dir; those made "
    "beforehand are named by worker.actor.cached_embeds_dir",
    "worker.rollout.open_ended_reward": "is not part of this version; write a reward function",
    "worker.actor.strategy": "FSDP2 is the only engine; remove it",
    "worker.ref.strategy": "FSDP2 is the only engine; remove it",
    "worker.actor.use_torch_compile": "is not part of this version; remove it",
    "worker.actor.dynamic_batching": "is not part of this version; set "
    "worker.actor.micro_batch_size_per_device_for_update",
    "worker.actor.use_kl_loss": "is algorithm.use_kl_loss here",
    "worker.actor.kl_coef": "is algorithm.kl_coef here",
    "worker.actor.kl_penalty": "is algorithm.kl_penalty here",
    "worker.ref.micro_batch_size_per_device_for_experience": "is taken from "
    "worker.actor.micro_batch_size_per_device_for_experience",
    "worker.ref.padding_free": "is taken from worker.actor.padding_free",
    "worker.ref.ulysses_size": "is taken from worker.actor.ulysses_size",
    "*.fsdp.enable_cpu_offload": "set offload.offload_params beside fsdp",
    "*.fsdp.enable_rank0_init": "weights are read from safetensors shard by shard; remove it",
    "*.fsdp.use_orig_params": "is not needed with FSDP2; remove it",
    "*.fsdp.torch_dtype": _PRECISION,
    "*.fsdp.mp_buffer": _PRECISION,
    "*.fsdp.fsdp_size": "parameters are sharded over all workers; remove it",
    "*.optim.training_steps": "is computed from the length of the run; remove it",
    "data.override_chat_template": "is not part of this version; change the tokenizer's template",
    "data.tokens_per_frame": "tokens are counted from the video's own size; set "
    "data.video_max_pixels to bound them",
    "trainer.save_model_only": "is not part of this version; scripts/model_merger.py exports the "
    "model from a checkpoint",
}


def legacy_hint(key: str) -> str | None:
    """What became of a key of EasyR1 or Long-RL; None when it is not one."""
    for pattern, hint in HINTS.items():
        if fnmatchcase(key, pattern):
            return hint
    return None
