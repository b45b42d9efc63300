"""Seconds of a GRPO group's training passes, recipe by recipe, on one GPU.

    python3 benchmarks/train_ladder.py --model 3b --prompts 36k,131k,252k --out FILE.json

One video prompt and G = 8 responses of 512 to 1,024 tokens, a model of the real shape with random
weights, features of the video given (as the store gives them), FSDP engine, float32 master weights,
bf16 compute, gradient checkpointing. A rung is what one update of the group costs:

    b  every response is a row of its own with the whole prompt; old and reference log-probs
    c  as b, the prompt computed once a group
    d  as c, without passes that add nothing (one optimizer step a batch, no KL)
    e  as d, attention kept by checkpointing and not computed again, the last layer trimmed
    f  as e, four questions about the video in one row, seconds a question (data.group_by_video=4)

All rungs run the same kernels, checkpointing, MLP tiles and log-prob chunks. Above 36k tokens rung
b is measured on one of the 8 rows and taken 8 times (`of_8` says so; `--replicated N` for N rows).
The optimizer step is left out everywhere, unless `--optimizer` asks for one (then `optimizer_s`).
Several GPUs: `torchrun --nproc-per-node N benchmarks/train_ladder.py --ulysses N`; without
`--ulysses` each has a group of its own, and seconds are a group's share.

Model FLOPs are those of the whole model, forward 2 N a token and 4 D a head and pair of query and
key that it sees, backward twice that: neither what is computed again nor what rung e leaves out
changes them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from plane.common import hardware, save, show, versions
from plane.tower import SHAPES as TOWERS
from plane.tower import bf16_peak
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen2_5_VLConfig

from verl.config import (
    ActorConfig,
    AlgorithmConfig,
    FSDPConfig,
    ModelConfig,
    OffloadConfig,
    OptimConfig,
)
from verl.data.media import MediaItem, MediaRef
from verl.data.preprocess import ResizeRule
from verl.models import loader
from verl.protocol import DataProto
from verl.sequence_parallel.layout import Layout
from verl.sequence_parallel.topology import SequenceGroup
from verl.utils.torch_functional import clip_and_check
from verl.workers.batches import response_rows
from verl.workers.dp_actor import DataParallelActor, StepTotals
from verl.workers.fsdp_engine import FSDPEngine

GROUP = 8
TEXT_TOKENS = 160
VIDEOS = {
    "1k": (16, 16, 16), "36k": (256, 20, 28), "131k": (256, 32, 64), "252k": (1800, 20, 28),
}  # fmt: skip
"""Temporal steps, and patches in height and width: 512 frames of 70 and of 256 tokens, and 3,600 of
70."""
TEXT_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 512,
        "tie_word_embeddings": True,
    },
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
RUNGS: dict[str, dict[str, Any]] = {
    "b": {"shared": False, "old_and_ref": True, "kept_and_trimmed": False, "questions": 1},
    "c": {"shared": True, "old_and_ref": True, "kept_and_trimmed": False, "questions": 1},
    "d": {"shared": True, "old_and_ref": False, "kept_and_trimmed": False, "questions": 1},
    "e": {"shared": True, "old_and_ref": False, "kept_and_trimmed": True, "questions": 1},
    "f": {"shared": True, "old_and_ref": False, "kept_and_trimmed": True, "questions": 4},
}


class StoredFeatures:
    """Stands for the encoder with a store that has everything."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._made: dict[int, Tensor] = {}

    def prepare(self, items: Any) -> None:
        """All is there."""

    def features(self, items: Sequence[MediaItem]) -> Tensor:
        n = sum(item.n_tokens for item in items)
        if n not in self._made:
            g = torch.Generator().manual_seed(n)
            self._made[n] = (torch.randn(n, self._width, generator=g) * 0.02).bfloat16()
        return self._made[n]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    args = _arguments(argv)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29512")
    on_gpu = args.device == "cuda"
    rank, world = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world)
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name() if on_gpu else None
    found: dict[str, Any] = {
        "part": "train_ladder",
        "hardware": hardware() | {"gpu": gpu},
        "versions": versions(),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "bf16_peak_flops": bf16_peak(device),
        "measured": [],
    }
    started = time.perf_counter()
    ladder = Ladder(args)
    found["build_and_warm_up_s"] = time.perf_counter() - started
    for prompt in args.prompts:
        for rung in args.rungs:
            found["measured"].append(ladder.run(prompt, rung))
            if rank == 0:
                print(json.dumps(found["measured"][-1]), flush=True)
                save(args.out, found)
    if rank == 0:
        show(found["measured"])
    dist.destroy_process_group()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=TEXT_SHAPES, default="3b")
    parser.add_argument(
        "--prompts",
        type=lambda t: t.split(","),
        default=["36k", "131k"],
        help=f"of {', '.join(VIDEOS)}",
    )
    parser.add_argument("--rungs", type=lambda t: t.split(","), default=list(RUNGS))
    parser.add_argument(
        "--replicated",
        type=int,
        default=1,
        help="rows of rung b to measure where the prompt is longer than 36k",
    )
    parser.add_argument("--response", type=int, default=1024, help="tokens of the longest")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="auto", help="model.attn_implementation")
    parser.add_argument("--compile", default="auto", help="model.compile_pointwise")
    parser.add_argument("--ulysses", type=int, default=1, help="worker.actor.ulysses_size")
    for part in ("params", "optimizer", "activations"):
        parser.add_argument(f"--offload-{part}", action="store_true")
    parser.add_argument("--optimizer", action="store_true", help="take the optimizer step too")
    parser.add_argument("--repeat", type=int, default=1, help="updates; the fastest counts")
    parser.add_argument("--profile", type=Path, help="write a table of kernels here")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


class Ladder:
    """One engine, on which every rung runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._shape = TEXT_SHAPES[args.model]
        self._device = torch.device(args.device)
        loader._random = _repeated_weights
        with tempfile.TemporaryDirectory() as folder:
            model_config(self._shape).save_pretrained(folder)
            self._engine = FSDPEngine(
                ModelConfig(
                    model_path=folder, init="random", attn_implementation=args.attention,
                    compile_pointwise=args.compile,
                ),
                FSDPConfig(),
                OffloadConfig(
                    offload_params=args.offload_params,
                    offload_optimizer=args.offload_optimizer,
                    offload_activations=args.offload_activations,
                ),
                init_device_mesh(self._device.type, (dist.get_world_size(),)),
                optim=OptimConfig(),
                total_steps=1,
                has_tower=False,
                sequence=SequenceGroup.of_neighbours(args.ulysses, self._device.type),
            )  # fmt: skip
        self._norm = self._optimizer_s = 0.0
        self._real_step = self._engine.optimizer_step
        self._engine.optimizer_step = self._step  # type: ignore[method-assign]
        self._features = StoredFeatures(self._shape["hidden_size"])
        self._warm_up()

    def _step(self) -> dict[str, float]:
        """In the optimizer's place: the gradient's norm, and the step apart, where it is wanted."""
        parameters = [p for p in self._engine.policy.parameters() if p.requires_grad]
        self._norm, _ = clip_and_check(parameters, math.inf)
        self._optimizer_s = 0.0
        if self._args.optimizer:
            self._optimizer_s, _ = self._timed(self._real_step)
        self._engine.optimizer.zero_grad(set_to_none=True)
        return {}

    def _warm_up(self) -> None:
        for rung in self._args.rungs:
            self.run("1k", rung)

    def run(self, prompt: str, rung: str) -> dict[str, Any]:
        """One update of the group by a recipe."""
        recipe = RUNGS[rung]
        questions = recipe["questions"]
        batch = self._batch(VIDEOS[prompt], questions, replicated=not recipe["shared"])
        n_rows = len(batch)
        best = recipe["kept_and_trimmed"]
        self._engine._model = replace(
            self._engine._model, keep_attention=best, trim_last_layer=best
        )
        actor = DataParallelActor(
            self._engine,
            self._features,  # type: ignore[arg-type]
            ActorConfig(
                shared_prefix=recipe["shared"],
                micro_batch_size_per_device_for_update=n_rows if recipe["shared"] else 1,
                micro_batch_size_per_device_for_experience=n_rows if recipe["shared"] else 1,
            ),
            AlgorithmConfig(disable_kl=not recipe["old_and_ref"]),
        )
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds: dict[str, float] = {"old": 0.0, "ref": 0.0}
        logp: list[Tensor] = []
        if recipe["old_and_ref"]:
            # The reference is a second model of the same shape: the same pass costs the same.
            for name in ("old", "ref"):
                seconds[name], logp = self._timed(lambda: actor.log_probs(batch, 1.0))
            batch = batch.with_columns(old_logp=logp, ref_logp=logp)
        n_tokens = sum(len(r) for r in batch["response_ids"])
        n_groups = dist.get_world_size() // self._args.ulysses
        totals = [StepTotals(n_tokens * n_groups, n_rows * n_groups)]
        seconds["update"] = math.inf
        for _ in range(self._args.repeat if prompt != "1k" else 1):
            with self._profiler():
                taken, (_, logp) = self._timed(lambda: actor.update(batch, totals, 1.0))
            seconds["update"] = min(seconds["update"], taken - self._optimizer_s)
        times = GROUP / n_rows / n_groups
        layouts = [
            row.layout
            for row in response_rows(
                batch, self._engine.adapter, shared_prefix=recipe["shared"], packed=True
            )
        ]
        found = self._row(prompt, rung, seconds, times, layouts, len(batch))
        return found | {"logp_mean": float(torch.cat(logp).mean())}

    def _row(
        self, prompt: str, rung: str, seconds: dict[str, float], times: float,
        layouts: Sequence[Layout], n_rows: int,
    ) -> dict[str, Any]:  # fmt: skip
        forward = sum(map(self._forward_flops, layouts))
        peak = bf16_peak(self._device)
        on_gpu = self._device.type == "cuda"
        return {
            "prompt": prompt,
            "rung": rung,
            "of_8": min(GROUP, n_rows),
            "old_s": times * seconds["old"],
            "ref_s": times * seconds["ref"],
            "update_s": times * seconds["update"],
            "group_s": times * sum(seconds.values()),
            "optimizer_s": self._optimizer_s,
            "update_mfu": 3 * forward / seconds["update"] / self._args.ulysses / peak
            if peak
            else None,
            "tokens_s": sum(layout.size for layout in layouts) / seconds["update"],
            "grad_norm": self._norm,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
            "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if on_gpu else None,
        }

    @contextmanager
    def _profiler(self) -> Iterator[None]:
        if self._args.profile is None:
            yield
            return
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profiler:
            yield
        table = profiler.key_averages().table(
            sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90
        )
        self._args.profile.write_text(table)

    def _timed(self, call: Any) -> tuple[float, Any]:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        found = call()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, found

    def _forward_flops(self, layout: Layout) -> float:
        """Of a row through the layers; the head is on response rows alone, and left out."""
        return self._engine.adapter.shape.forward_flops(layout.size, layout.n_pairs)

    def _batch(self, grid: tuple[int, int, int], questions: int, *, replicated: bool) -> DataProto:
        n_visual = grid[0] * grid[1] * grid[2] // 4
        rule = ResizeRule(min_pixels=56 * 56, max_pixels=56 * 56)
        ref = MediaRef(kind="video", path="/none", sampling=None, resize=rule, key=str(grid))
        film = MediaItem(ref, grid, 2.0, n_visual, ())
        g = torch.Generator().manual_seed(0)
        text = torch.randint(8, 500, (TEXT_TOKENS,), generator=g)
        video_id = self._engine.adapter.forbidden_ids[1]
        prompt = torch.cat([text[:10], torch.full((n_visual,), video_id), text[10:]])
        longest = self._args.response
        lengths = [longest // 2 + longest // 2 * i // (GROUP - 1) for i in range(GROUP)]
        responses = [torch.randint(8, 500, (n,), generator=g) for n in lengths]
        if replicated:
            # The middle ones: their mean length is the group's.
            count = GROUP if n_visual <= 36_000 else min(self._args.replicated, GROUP)
            responses = responses[(GROUP - count) // 2 :][:count]
        n = len(responses)
        prompts = [prompt]
        for _ in range(1, questions):
            other = torch.randint(8, 500, (TEXT_TOKENS - 10,), generator=g)
            prompts.append(torch.cat([prompt[: 10 + n_visual], other]))
        columns = {
            "uid": [f"question {q}" for q in range(questions) for _ in range(n)],
            "prompt_ids": [p for p in prompts for _ in range(n)],
            "media": [(film,)] * (n * questions),
            "response_ids": responses * questions,
            "advantage": [1.0 if i % 2 else -1.0 for i in range(n)] * questions,
        }
        return DataProto(columns, {"temperature": 1.0, "kl_coef": 0.01})


def _repeated_weights(cls: Any, config: Any, dtype: torch.dtype, seed: int) -> torch.nn.Module:
    """Weights from one block of numbers, repeated.

    To draw three billion takes longer than all that is measured, and time does not depend on them.
    """
    with init_empty_weights(include_buffers=False):
        hf = cls._from_config(config, dtype=dtype)
    hf.tie_weights()
    loader.materialize(hf, torch.device("cpu"))
    g = torch.Generator().manual_seed(seed)
    # A length that no width divides, so that rows differ.
    block = torch.randn(2**20 - 3, generator=g) * 0.02
    for p in hf.parameters():
        if p.ndim == 1:
            p.data.fill_(1.0)
        else:
            p.data.view(-1).copy_(block.repeat(-(-p.numel() // len(block)))[: p.numel()])
    return hf


def model_config(shape: dict[str, Any], tower: str = "tiny") -> Qwen2_5_VLConfig:
    """Of a model with these sizes and a tower by name, small where it is never built."""
    text = shape | {
        "max_position_embeddings": 300000, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = dict(TOWERS[tower], out_hidden_size=text["hidden_size"])
    ids = {"image_token_id": 1, "video_token_id": 2}
    ids |= {"vision_start_token_id": 3, "vision_end_token_id": 4}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return Qwen2_5_VLConfig(
        text_config=text | special, vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"], **ids,
    )  # fmt: skip


if __name__ == "__main__":
    main()
