"""Checks the engine on one device: `python3 benchmarks/check_device.py [--device D] [--out F]`.

Needs no Ray and no data: the quickstart's base model answers random prompts, then trains on them.
For each recipe it reports how far the rollout engine's log-probs are from the trainer's on the same
weights, the gradient norms of three steps, and seconds; for attention, the error of each backend
against float32. Recipes must agree within their arithmetic; nothing is asserted here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh

from verl.config import (
    ActorConfig,
    AlgorithmConfig,
    FSDPConfig,
    ModelConfig,
    OffloadConfig,
    OptimConfig,
)
from verl.models.loader import build_model
from verl.protocol import DataProto
from verl.rollout import RolloutRequest, SamplingParams
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, PackedAttention, attention_over
from verl.sequence_parallel.layout import Layout
from verl.workers.dp_actor import DataParallelActor, StepTotals
from verl.workers.fsdp_engine import FSDPEngine

MODEL = "examples/quickstart/base"
LAYOUT = Layout.of_groups((130, 77, 300), ((40, 3), (), (20, 20, 1)))
RECIPES: dict[str, dict[str, Any]] = {
    "auto": {},
    "float32": {"fsdp": FSDPConfig(mp_param="fp32")},
    "sdpa": {"model": {"attn_implementation": "sdpa"}},
    "flash": {"model": {"attn_implementation": "flash"}},
    "cudnn": {"model": {"attn_implementation": "cudnn"}},
    "attention again, MLP whole": {"model": {"keep_attention": False, "mlp_tile_tokens": -1}},
    "tiles of 100": {"model": {"mlp_tile_tokens": 100}},
    "activations offloaded": {"offload": OffloadConfig(offload_activations=True)},
    "pointwise uncompiled, last layer whole": {
        "model": {"compile_pointwise": "off", "trim_last_layer": False}
    },
    "moments in bf16": {"optim": {"moment_dtype": "bf16"}},
    "optimizer offloaded": {"offload": OffloadConfig(offload_optimizer=True)},
    "all offloaded": {"offload": OffloadConfig(offload_params=True, offload_optimizer=True)},
}


class NoMedia:
    """Stands in for the encoder: the prompts here are text."""

    def prepare(self, items: Any) -> None:
        """Nothing is stored."""

    def features(self, items: Any) -> None:
        return None


def check_attention(device: torch.device) -> dict[str, dict[str, float]]:
    """Relative error of output and gradients against float32, by dtype and backend."""
    n = LAYOUT.size
    found = {}
    for kernel in ("sdpa", "flash", "cudnn") if device.type == "cuda" else ("sdpa",):
        g = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(heads, n, 64, generator=g, device=device, dtype=torch.bfloat16)
            for heads in (8, 2, 2)
        )
        weight = torch.randn(n, 8, 64, generator=g, device=device)
        expected = _with_gradients(
            PackedAttention(LAYOUT, device), (q, k, v), weight, torch.float32
        )
        got = _with_gradients(
            attention_over(LAYOUT, device, kernel), (q, k, v), weight, torch.bfloat16
        )
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
        found[f"bf16 {kernel}"] = dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
    return found


def _with_gradients(attention: Any, qkv: Any, weight: Any, dtype: torch.dtype) -> list[Any]:
    leaves = [x.to(dtype).requires_grad_() for x in qkv]
    out = attention(0, *leaves, 0.125).float()
    return [out.detach(), *(g.float() for g in torch.autograd.grad((out * weight).sum(), leaves))]


def check_training(device: torch.device, recipe: dict[str, Any]) -> dict[str, Any]:
    """Samples from the model, then takes three policy steps on the samples."""
    model = ModelConfig(model_path=MODEL, freeze_vision_tower=True, **recipe.get("model", {}))
    engine = FSDPEngine(
        model,
        recipe.get("fsdp", FSDPConfig()),
        recipe.get("offload", OffloadConfig()),
        init_device_mesh(device.type, (1,)),
        optim=OptimConfig(lr=1e-3, **recipe.get("optim", {})),
        total_steps=3,
    )
    hf = build_model(model, dtype=engine.compute_dtype, attention=ATTENTION, materialize=False)
    rollout = HFRollout.with_empty_weights(hf, engine.adapter, engine.device, 8192)
    rollout.load_weights(engine.named_full_tensors())
    batch, rollout_logp, seconds = _sample(rollout)
    actor: Any = DataParallelActor(
        engine,
        NoMedia(),  # type: ignore[arg-type]
        ActorConfig(micro_batch_size_per_device_for_update=24),
        AlgorithmConfig(disable_kl=True),
    )
    totals = [StepTotals(sum(len(r) for r in batch["response_ids"]), len(batch))]
    norms, gaps = [], torch.zeros(1)
    for step in range(3):
        metrics, log_probs = actor.update(batch, totals, 1.0)
        norms.append(metrics["grad_norm"][0])
        if step == 0:
            gaps = torch.cat(list(log_probs)) - torch.cat(rollout_logp)
    return {
        "compute": str(engine.compute_dtype),
        "mismatch_mean_abs": gaps.abs().mean().item(),
        "mismatch_max_abs": gaps.abs().max().item(),
        "grad_norms": norms,
        "generation_s": seconds,
    }


def _sample(rollout: HFRollout) -> tuple[DataProto, list[Any], float]:
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(270, 500, (40 + 5 * i,), generator=g) for i in range(6)]
    requests = [
        RolloutRequest(p, torch.arange(len(p)).expand(3, -1), None, tuple(range(8 * i, 8 * i + 8)))
        for i, p in enumerate(prompts)
    ]
    started = time.perf_counter()
    outputs = rollout.generate(requests, SamplingParams(max_tokens=32, stop_ids=(2,)))
    seconds = time.perf_counter() - started
    rows = [(i, sample) for i, samples in enumerate(outputs) for sample in samples]
    columns = {
        "uid": [f"prompt {i}" for i, _ in rows],
        "prompt_ids": [prompts[i] for i, _ in rows],
        "media": [() for _ in rows],
        "response_ids": [sample.token_ids for _, sample in rows],
        "advantage": [float(j % 3 - 1) for j in range(len(rows))],
    }
    batch = DataProto(columns, {"temperature": 1.0, "kl_coef": 0.0})
    return batch, [sample.log_probs for _, sample in rows], seconds


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    report: dict[str, Any] = {
        "device": name or args.device,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "attention": check_attention(device),
        "training": {
            name: check_training(device, recipe)
            for name, recipe in RECIPES.items()
            if args.device == "cuda" or "attn_implementation" not in recipe.get("model", {})
        },
    }
    print(f"{report['device']}, torch {torch.__version__}")
    for backend_name, errors in report["attention"].items():
        print(f"attention {backend_name:12}", *(f"{k} {v:.1e}" for k, v in errors.items()))
    for recipe, found in report["training"].items():
        norms = " ".join(f"{x:.4f}" for x in found["grad_norms"])
        print(
            f"{recipe:20} {found['compute']:15} mismatch mean {found['mismatch_mean_abs']:.1e} "
            f"max {found['mismatch_max_abs']:.1e}  gradient norms {norms}"
        )
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
