"""Asks a merged model one question of the test split: `python3 ask.py MODEL DATA`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from verl.config import DataConfig, ModelConfig
from verl.data.dataset import PromptDataset
from verl.models.loader import build_model, load_adapter, load_tokenizer
from verl.rollout import RolloutRequest, SamplingParams
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, register_attention
from verl.trainer.sampling import stop_ids
from verl.workers.encoder import MediaEncoder, WholeModel
from verl.workers.media_stores import media_cache

model_path, data = sys.argv[1], Path(sys.argv[2])
settings = DataConfig(
    val_files=[str(data / "test.jsonl")],
    video_dir=str(data / "videos"),
    cache_dir=str(data.parent / "cache"),
    format_prompt="examples/quickstart/prompt.jinja",
    num_video_frames=64,
    video_min_pixels=3136,
    video_max_pixels=3136,
)
model = ModelConfig(model_path=model_path)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
register_attention()
hf = build_model(model, dtype=torch.float32, attention=ATTENTION, materialize=True).to(device)
tokenizer, adapter = load_tokenizer(model), load_adapter(model)
sample = PromptDataset(settings, tokenizer, adapter, files=settings.val_files).sample(0)
encoder = MediaEncoder(WholeModel(hf, adapter, device), media_cache(settings))
ids = torch.tensor(sample.prompt_ids)
request = RolloutRequest(
    ids, adapter.positions(ids, sample.media), encoder.features(sample.media), (0,)
)
params = SamplingParams(max_tokens=48, temperature=0.0, stop_ids=stop_ids(tokenizer))
answer = HFRollout(hf, adapter, device, 8192).generate([request], params)[0][0]
print(f"video:    {sample.media[0].ref.path}")
print(f"question: {sample.question} {' '.join(sample.options)}")
print(f"answer:   {tokenizer.decode(answer.token_ids, skip_special_tokens=True)}")
print(f"right:    {sample.answer}")
print(f"filmed:   {json.dumps(sample.extra['events'])}")
