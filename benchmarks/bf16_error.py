"""How far bf16 is from float32, with a group's prompt computed once and once a response.

    python3 benchmarks/bf16_error.py [--device D] [--out FILE.json]

A random decoder of four layers takes one update of a group: 8 responses to a prompt of 4,000
tokens. The reference is float32 with every sequence a row of its own. For each attention kernel the
table has the relative error of log-probs and of the gradient (the norm of the difference over the
norm, all parameters together, and the worst parameter) of both ways in bf16, the mean of several
groups, and what the shared prompt's is of the replicated ones'. Nothing is asserted here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plane.common import hardware, save, show, versions
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from train_ladder import StoredFeatures, model_config

from verl.config import (
    ActorConfig,
    AlgorithmConfig,
    FSDPConfig,
    ModelConfig,
    OffloadConfig,
    OptimConfig,
)
from verl.protocol import DataProto
from verl.workers.dp_actor import DataParallelActor, StepTotals
from verl.workers.fsdp_engine import FSDPEngine

SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip
RESPONSES = (200, 1, 130, 77, 200, 150, 64, 101)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", type=int, default=4000, help="tokens")
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29513")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=0, world_size=1)
    found: dict[str, Any] = {
        "part": "bf16_error",
        "hardware": hardware() | {"gpu": torch.cuda.get_device_name() if on_gpu else None},
        "versions": versions(),
        "settings": {
            "prompt": args.prompt, "groups": args.groups, "responses": RESPONSES, "shape": SHAPE,
        },
        "measured": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model_config(SHAPE).save_pretrained(folder)
        batches = [group(args.prompt, seed) for seed in range(args.groups)]
        reference = build(folder, args.device, "sdpa", "fp32")
        exact = [update(reference, batch, shared=False) for batch in batches]
        for kernel in ("cudnn", "flash", "sdpa") if on_gpu else ("sdpa",):
            engine = build(folder, args.device, kernel, "bf16")
            rows = {
                prompt: mean_errors(engine, batches, exact, shared=prompt == "shared")
                for prompt in ("replicated", "shared")
            }
            of = {k: v / rows["replicated"][k] for k, v in rows["shared"].items()}
            for prompt, row in (rows | {"shared of replicated": of}).items():
                found["measured"].append({"kernel": kernel, "prompt": prompt, **row})
    save(args.out, found)
    show(found["measured"])
    dist.destroy_process_group()


Update = tuple[Tensor, dict[str, Tensor]]
"""Log-probs of all responses, and the gradient by parameter."""


def build(folder: str, device: str, kernel: Any, precision: Any) -> FSDPEngine:
    """The same weights every time."""
    return FSDPEngine(
        ModelConfig(model_path=folder, init="random", attn_implementation=kernel),
        FSDPConfig(mp_param=precision),
        OffloadConfig(),
        init_device_mesh(device, (1,)),
        optim=OptimConfig(),
        total_steps=1,
        has_tower=False,
    )


def update(engine: FSDPEngine, batch: DataProto, *, shared: bool) -> Update:
    """One update of the group, up to its gradient."""
    gradients: dict[str, Tensor] = {}

    def keep() -> dict[str, float]:
        for name, p in engine.policy.named_parameters():
            if p.grad is not None:
                gradients[name] = p.grad.to_local().double().cpu()  # type: ignore[attr-defined]
        engine.optimizer.zero_grad()
        return {}

    engine.optimizer_step = keep  # type: ignore[method-assign]
    actor = DataParallelActor(
        engine,
        StoredFeatures(SHAPE["hidden_size"]),  # type: ignore[arg-type]
        ActorConfig(
            shared_prefix=shared, micro_batch_size_per_device_for_update=8 if shared else 1
        ),
        AlgorithmConfig(disable_kl=True),
    )
    _, logps = actor.update(batch, [StepTotals(sum(RESPONSES), len(RESPONSES))], 1.0)
    return torch.cat(logps).double(), gradients


def group(n_prompt: int, seed: int) -> DataProto:
    """A text prompt with its responses."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(8, 2048, (n_prompt,), generator=g)
    n = len(RESPONSES)
    columns = {
        "uid": ["question"] * n,
        "prompt_ids": [prompt] * n,
        "media": [()] * n,
        "response_ids": [torch.randint(8, 2048, (m,), generator=g) for m in RESPONSES],
        "advantage": torch.randn(n, generator=g).tolist(),
    }
    return DataProto(columns, {"temperature": 1.0, "kl_coef": 0.0})


def mean_errors(
    engine: FSDPEngine, batches: Sequence[DataProto], exact: Sequence[Update], *, shared: bool
) -> dict[str, float]:
    """Of one update a batch, each from the same weights."""
    rows = [
        errors(update(engine, batch, shared=shared), right)
        for batch, right in zip(batches, exact, strict=True)
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def errors(found: Update, exact: Update) -> dict[str, float]:
    """Relative errors of an update."""
    gaps = {name: found[1][name] - right for name, right in exact[1].items()}
    whole = torch.cat([g.flatten() for g in gaps.values()]).norm()
    norm = torch.cat([g.flatten() for g in exact[1].values()]).norm()
    worst = max(float(gap.norm() / exact[1][name].norm()) for name, gap in gaps.items())
    return {
        "log_probs": float((found[0] - exact[0]).norm() / exact[0].norm()),
        "gradient": float(whole / norm),
        "worst_parameter": worst,
    }


if __name__ == "__main__":
    main()
