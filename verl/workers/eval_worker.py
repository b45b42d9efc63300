"""A worker that only answers: the whole model, its frozen tower, a rollout engine."""

from __future__ import annotations

from typing import Any

import torch

from verl.config import EvalConfig, ModelConfig
from verl.models.fingerprint import FeatureName, feature_name
from verl.models.loader import build_model, load_adapter
from verl.models.tower_compile import compile_tower
from verl.protocol import DataProto
from verl.sequence_parallel.attention import ATTENTION, register_attention
from verl.sequence_parallel.topology import SequenceGroup
from verl.single_controller.decorator import Dispatch, dispatch
from verl.single_controller.worker import Worker
from verl.workers.encoder import MediaEncoder, WholeModel
from verl.workers.media_stores import media_cache, media_counts, stored_features
from verl.workers.rollouts import build_rollout, generate_together


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
        has_tower = config.cached_embeds_dir is None
        hf = build_model(model, dtype=dtype, attention=ATTENTION, materialize=True, tower=has_tower)
        adapter = load_adapter(model)
        self._adapter = adapter
        data, rollout = config.data, config.rollout
        self._engine_group = SequenceGroup.of_neighbours(
            rollout.tensor_parallel_size, self.device.type
        )
        self._rollout = build_rollout(rollout, model, data, adapter, dtype, self.device, hf)
        if rollout.name == "vllm":
            self._rollout.load_weights(hf.state_dict().items())
            tower = adapter.vision_tower(hf) if has_tower else None
            if tower is not None:
                tower.to(self.device)
        compile_tower(adapter, hf, self.device, model.compile_vision_tower)
        whole = WholeModel(hf, adapter, self.device, has_tower=has_tower)
        self._cache = media_cache(data)
        self._name, stored = None, None
        if adapter.vision is not None:
            self._name = feature_name(model, adapter, hf, dtype, has_tower=has_tower)
            stored = stored_features(
                self._name, adapter, data, config.cached_embeds_dir, config.rollout.num_chunk_seq
            )
        self._sighted = MediaEncoder(whole, self._cache, stored)
        self._blind = MediaEncoder(whole, self._cache, stored, blank=True)

    @dispatch(Dispatch.ALL)
    def feature_name(self) -> FeatureName | None:
        """What names the features that are read; None for a model of text alone."""
        return self._name

    @dispatch(Dispatch.ALL)
    def media_counts(self) -> dict[str, int]:
        """Pieces of media decoded and encoded by this process so far."""
        return media_counts(self._cache, [self._sighted, self._blind])

    @dispatch(Dispatch.DP)
    def generate(self, prompts: DataProto) -> DataProto:
        """Samples for every prompt; `prompts.meta["blank"]` hides the frames."""
        encoder = self._blind if prompts.meta["blank"] else self._sighted
        return generate_together(prompts, self._adapter, encoder, self._rollout, self._engine_group)
