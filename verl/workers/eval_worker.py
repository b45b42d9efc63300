"""A worker that only answers: the whole model, its frozen tower, a rollout engine."""

from __future__ import annotations

from typing import Any

import torch

from verl.config import EvalConfig, ModelConfig
from verl.models.loader import build_model, load_adapter
from verl.protocol import DataProto
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, register_attention
from verl.single_controller.decorator import Dispatch, dispatch
from verl.single_controller.worker import Worker
from verl.workers.encoder import MediaEncoder, WholeModel
from verl.workers.fsdp_workers import GIB, media_cache
from verl.workers.generation import generate


class EvalWorker(Worker):
    """Answers prompts on one device."""

    def __init__(self, config: EvalConfig, **worker: Any) -> None:
        super().__init__(**worker)
        self._config = config

    @dispatch(Dispatch.ALL)
    def init_model(self) -> None:
        """Loads the model; bf16 on CUDA, float32 on the CPU."""
        config = self._config
        model = ModelConfig(model_path=config.model_path, tokenizer_path=config.tokenizer_path)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        register_attention()
        hf = build_model(model, dtype=dtype, attention=ATTENTION, materialize=True)
        adapter = load_adapter(model)
        self._adapter = adapter
        data = config.data
        budget = config.rollout.tokens_at_once(data.max_prompt_length, data.max_response_length)
        self._rollout = HFRollout(hf, adapter, self.device, budget)
        whole, cache = WholeModel(hf, adapter, self.device), media_cache(config.data)
        # Two encoders share the process, and so its bound.
        limit = int(config.data.cache_features_gib * GIB) // 2
        self._sighted = MediaEncoder(whole, cache, limit)
        self._blind = MediaEncoder(whole, cache, limit, blank=True)

    @dispatch(Dispatch.DP)
    def generate(self, prompts: DataProto) -> DataProto:
        """Samples for every prompt; `prompts.meta["blank"]` hides the frames."""
        encoder = self._blind if prompts.meta["blank"] else self._sighted
        return generate(prompts, self._adapter, encoder, self._rollout)
