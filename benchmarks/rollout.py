"""The vLLM rollout engine on one device: agreement, speed, weight sync, sleep, start-up.

    python3 benchmarks/rollout.py --model 3b --prompts 16k,65k,230k --out FILE.json

A model of the real shape with random weights, in one process with the trainer's engine, as in a
worker. Parts, chosen by `--parts`:

    agreement  log-probs of sampled words against the trainer's, before and after two weight syncs,
               and after sleep; exit code 1 where they differ by more than `--bound` on average
    speed      seconds of a group's prefill and of its decoding, beside what the hardware allows
    sync       seconds and GB/s of a weight sync
    sleep      seconds of sleeping and waking, and the memory that is given back
    start      seconds of the engine's start, by part (run twice: the first start fills caches)

`--cascade` is an experiment with vLLM 0.26: the keys and values of a prompt are read once for all
of its samples in each step of decoding. vLLM's own rule, which expects no split of the prefix over
multiprocessors, wants more than 66 samples for that with 16 heads and 2 KV heads; here it is
overruled. 0.32 has no cascade attention any more.

Prefill's limit is the model's forward FLOPs at the device's bf16 peak. Decoding's is memory: each
step reads all weights, and each of the G samples the keys and values of the prompt and its own.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plane.common import hardware, save, show, versions
from plane.tower import SHAPES as TOWERS
from plane.tower import bf16_peak
from torch.distributed.device_mesh import init_device_mesh
from train_ladder import TEXT_SHAPES, _repeated_weights, model_config

from verl.config import (
    DataConfig,
    FSDPConfig,
    ModelConfig,
    OffloadConfig,
    OptimConfig,
    RolloutConfig,
)
from verl.data.media import MediaItem, MediaRef
from verl.data.preprocess import ResizeRule
from verl.models import loader
from verl.rollout import RequestMedia, RolloutOutput, RolloutRequest, SamplingParams
from verl.sequence_parallel.packing import Group, pack
from verl.workers.fsdp_engine import FSDPEngine
from verl.workers.rollouts import build_rollout

GROUP = 8
PARTS = ("start", "agreement", "sync", "sleep", "speed")
VIDEOS = {
    "tiny": (4, 16, 16), "2k": (32, 16, 16), "16k": (256, 16, 16), "36k": (256, 20, 28),
    "65k": (256, 32, 32), "131k": (256, 32, 64), "230k": (1800, 16, 32),
}  # fmt: skip
"""Temporal steps, and patches in height and width."""
TEXT_TOKENS = 160
BYTES_PER_SECOND = {"H100": 3.35e12, "H200": 4.8e12}
"""Memory bandwidth by name of the GPU."""


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    args = _arguments(argv)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29514")
    on_gpu = args.device == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=0, world_size=1)
    found: dict[str, Any] = {
        "part": "rollout",
        "hardware": hardware() | {"gpu": torch.cuda.get_device_name() if on_gpu else None},
        "versions": versions() | {"vllm": _vllm_version()},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "PYTORCH_"))},
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "measured": [],
    }
    bench = Bench(args)
    for part in (p for p in PARTS if p in args.parts):
        for row in getattr(bench, part)():
            found["measured"].append({"what": part} | row)
            print(found["measured"][-1], flush=True)
            save(args.out, found)
    show(found["measured"])
    worst = max((row.get("mean_abs", 0.0) for row in found["measured"]), default=0.0)
    if worst > args.bound:
        print(f"log-probs differ by {worst:.3g} on average, more than --bound {args.bound:g}")
    sys.stdout.flush()
    os._exit(
        worst > args.bound
    )  # an engine that is taken down in a certain order complains of the other


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=TEXT_SHAPES, default="3b")
    parser.add_argument("--parts", type=names, default=list(PARTS))
    parser.add_argument("--prompts", type=names, default=["16k", "65k", "230k"])
    parser.add_argument("--agree", type=names, default=["2k"], help="prompts of the agreement")
    parser.add_argument("--bound", type=float, default=0.02, help="nats, of mean_abs")
    parser.add_argument("--response", type=int, default=64, help="tokens to decode")
    parser.add_argument("--batched", type=int, default=16384, help="max_num_batched_tokens")
    parser.add_argument("--memory", type=float, default=0.6, help="gpu_memory_utilization")
    parser.add_argument("--eager", action="store_true", help="enforce_eager")
    parser.add_argument("--cascade", action="store_true", help="read a prompt's keys once a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _vllm_version() -> str | None:
    from verl.rollout.vllm_compat import vllm_version

    return vllm_version()


class Bench:
    """A trainer's engine and a rollout engine in one process."""

    def __init__(
        self, args: argparse.Namespace, *, has_tower: bool = False, offload_optimizer: bool = False
    ) -> None:
        self._args = args
        self._shape = TEXT_SHAPES[args.model]
        self._device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
        loader._random = _repeated_weights
        self._folder = tempfile.mkdtemp(prefix="rollout_bench_")
        tower = args.model if has_tower and args.model in TOWERS else "tiny"
        model_config(self._shape, tower).save_pretrained(self._folder)
        _write_tokenizer(Path(self._folder), self._shape["vocab_size"])
        self._model = ModelConfig(model_path=self._folder, init="random")
        started = time.perf_counter()
        self._engine = FSDPEngine(
            self._model, FSDPConfig(), OffloadConfig(offload_optimizer=offload_optimizer),
            init_device_mesh(args.device, (1,)), optim=OptimConfig(), total_steps=1,
            has_tower=has_tower,
        )  # fmt: skip
        self._trainer_s = time.perf_counter() - started
        longest = max(self._tokens(p) for p in ("tiny", *args.prompts, *getattr(args, "agree", ())))
        data = DataConfig(max_prompt_length=longest, max_response_length=max(args.response + 1, 64))
        config = RolloutConfig(
            name="vllm", max_num_batched_tokens=args.batched, max_num_seqs=4 * GROUP,
            gpu_memory_utilization=args.memory, enforce_eager=args.eager,
        )  # fmt: skip
        if getattr(args, "cascade", False):
            _overrule_cascade()
        started = time.perf_counter()
        self._rollout = build_rollout(
            config, self._model, data, self._engine.adapter, self._engine.compute_dtype,
            self._device,
        )  # fmt: skip
        self._start_s = time.perf_counter() - started
        self._sync_s = [self._sync()]

    def start(self) -> list[dict[str, Any]]:
        """Of the trainer's engine, and of vLLM by part."""
        request = self._request("tiny", seed=0)
        first, _ = self._timed(lambda: self._generate([request], 1))
        parts = self._rollout.start_up_seconds()
        return [{"trainer_s": self._trainer_s, "total_s": self._start_s, "first_prompt_s": first}
                | {f"{name}_s".replace(" ", "_"): s for name, s in parts.items()}]  # fmt: skip

    def agreement(self) -> list[dict[str, Any]]:
        """Before a change of the weights, after each of two, and of a third made in its sleep."""
        rows = []
        for sync in range(4):
            if sync == 3:
                self._rollout.sleep()
            if sync:
                self._change_weights()
                self._sync_s.append(self._sync())
            for prompt, temperature in itertools.product(self._args.agree, (1.0, 0.7)):
                # Other features every time: nothing of the last round can serve.
                n = 4 if self._tokens(prompt) < 8192 else 1
                requests = [self._request(prompt, seed=10 * sync + i) for i in range(n)]
                outputs = self._generate(requests, 64, temperature)
                rows.append(
                    {"sync": sync, "slept": sync == 3, "prompt": prompt, "temperature": temperature}
                    | self._gaps(requests, outputs, temperature)
                )
        return rows

    def sync(self) -> list[dict[str, Any]]:
        """Of all that were made so far and three more."""
        size = sum(
            t.numel() * self._engine.compute_dtype.itemsize
            for t in self._engine.policy.hf.state_dict().values()
        )
        seconds = self._sync_s + [self._sync() for _ in range(3)]
        best = min(seconds)
        return [
            {"gb": size / 1e9, "first_s": seconds[0], "best_s": best, "gb_s": size / 1e9 / best}
        ]

    def speed(self) -> list[dict[str, Any]]:
        """A group's prefill, again with its prefix cached, and decoding."""
        rows = []
        for prompt in self._args.prompts:
            request = self._request(prompt, seed=99)
            n = self._args.response
            first, _ = self._timed(partial(self._generate, [request], 1))
            cached, _ = self._timed(partial(self._generate, [request], 1))
            both, outputs = self._timed(partial(self._generate, [request], n + 1))
            decoded = sum(len(o.token_ids) - 1 for o in outputs[0])
            rows.append(self._speed_row(prompt, first, cached, both - cached, decoded))
            self._rollout._llm.reset_prefix_cache()
        return rows

    def sleep(self) -> list[dict[str, Any]]:
        """What sleep gives back, and how long waking with new weights takes."""
        if self._device.type == "cpu":
            return []
        awake_sync = self._sync()
        torch.cuda.empty_cache()
        before, counted = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
        slept, _ = self._timed(self._rollout.sleep)
        freed = torch.cuda.mem_get_info()[0] - before
        still_counted = self._rollout.asleep_bytes() - (counted - torch.cuda.memory_allocated())
        woken = self._sync()
        return [
            {
                "sleep_s": slept, "freed_gb": freed / 1e9,
                "counted_by_torch_gb": still_counted / 1e9,
                "wake_and_sync_s": woken, "sync_s": awake_sync,
            }
        ]  # fmt: skip

    def _speed_row(
        self, prompt: str, first: float, cached: float, decoding: float, decoded: int
    ) -> dict[str, Any]:
        shape, tokens = self._engine.adapter.shape, self._tokens(prompt)
        flops = shape.forward_flops(tokens, tokens * (tokens + 1) // 2)
        steps = decoded / GROUP
        row = {
            "prompt": prompt, "tokens": tokens, "prefill_s": first, "again_s": cached,
            "prefill_tokens_s": tokens / first, "decode_s": decoding,
            "decode_tokens_s": decoded / decoding, "decode_step_ms": 1e3 * decoding / steps,
            "cascades": CASCADES[0],
        }  # fmt: skip
        peak = bf16_peak(self._device)
        bandwidth = _bandwidth(self._device)
        if peak and bandwidth:
            of_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
            read = 2 * shape.parameters + GROUP * tokens * of_token
            row |= {
                "prefill_limit_s": flops / peak, "prefill_of_limit": flops / peak / first,
                "decode_limit_ms": 1e3 * read / bandwidth,
                "decode_of_limit": read / bandwidth / (decoding / steps),
            }  # fmt: skip
        return row

    def _sync(self) -> float:
        weights = self._engine.named_full_tensors
        return self._timed(lambda: self._rollout.load_weights(weights()))[0]

    @torch.no_grad()
    def _change_weights(self) -> None:
        for p in self._engine.policy.parameters():
            local: Any = p.data.to_local() if hasattr(p.data, "to_local") else p.data
            local.mul_(1 + 0.05 * torch.rand((), device=local.device))

    def _gaps(
        self, requests: Sequence[RolloutRequest], outputs: Sequence[Sequence[RolloutOutput]],
        temperature: float,
    ) -> dict[str, float]:  # fmt: skip
        """Of all sampled words; trainer less engine."""
        gaps = []
        for request, samples in zip(requests, outputs, strict=True):
            row = pack(
                [Group(request.prompt_ids, request.positions, tuple(o.token_ids for o in samples))]
            )
            with torch.no_grad():
                logp, _ = self._engine.forward(
                    row, features_ME=request.features, vision=None, temperature=temperature
                )
            gaps.append(logp.float().cpu() - torch.cat([o.log_probs for o in samples]))
        gap = torch.cat(gaps)
        return {
            "words": float(len(gap)), "mean_abs": float(gap.abs().mean()),
            "max_abs": float(gap.abs().max()), "k3": float((gap.expm1() - gap).mean()),
        }  # fmt: skip

    def _generate(
        self, requests: Sequence[RolloutRequest], tokens: int, temperature: float = 1.0
    ) -> list[list[RolloutOutput]]:
        return self._rollout.generate(requests, SamplingParams(tokens, temperature))

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        found = call()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, found

    def _tokens(self, prompt: str) -> int:
        t, h, w = VIDEOS[prompt]
        return t * h * w // 4 + TEXT_TOKENS

    def _request(self, prompt: str, seed: int) -> RolloutRequest:
        """A group about a video, with random features."""
        grid, adapter = VIDEOS[prompt], self._engine.adapter
        n_visual = self._tokens(prompt) - TEXT_TOKENS
        rule = ResizeRule(min_pixels=56 * 56, max_pixels=56 * 56)
        ref = MediaRef(kind="video", path="/none", sampling=None, resize=rule, key=prompt)
        item = MediaItem(ref, grid, 1.0, n_visual, ())
        g = torch.Generator().manual_seed(seed)
        text = torch.randint(8, 500, (TEXT_TOKENS,), generator=g)
        video = torch.full((n_visual,), adapter.forbidden_ids[1])
        ids = torch.cat([text[:10], video, text[10:]])
        features = torch.randn(n_visual, adapter.shape.hidden, generator=g) * 0.02
        return RolloutRequest(
            ids, adapter.positions(ids, [item]), features.to(self._engine.compute_dtype),
            tuple(range(GROUP * seed, GROUP * seed + GROUP)),
            (RequestMedia("video", grid, 1.0, n_visual, f"{prompt} {seed}"),), f"{prompt} {seed}",
        )  # fmt: skip


CASCADES = [0]
"""How many steps of decoding took it."""


def _overrule_cascade() -> None:
    """Cascade attention whenever several samples of a long prompt are decoded, and nothing else is.

    Attention stands outside of CUDA graphs then, which takes the compiler that cuts the model up.
    """
    from vllm.v1.attention.backends import flash_attn

    from verl.rollout import vllm_rollout

    def is_decoding(_: Any, common_prefix_len: int, query_lens: Any, **_others: Any) -> bool:
        is_so = common_prefix_len >= 4096 and len(query_lens) > 1 and bool((query_lens == 1).all())
        CASCADES[0] += is_so
        return is_so

    flash_attn.FlashAttentionMetadataBuilder.use_cascade_attention = is_decoding  # type: ignore[method-assign]
    plain = vllm_rollout.engine_arguments
    graphs = {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"}
    vllm_rollout.engine_arguments = lambda *given: (
        plain(*given) | {"disable_cascade_attn": False, "compilation_config": graphs}
    )


def _bandwidth(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((b for known, b in BYTES_PER_SECOND.items() if known in name), None)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Words that are their numbers: prompts here are made of ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<image>": 1, "<video>": 2, "<start>": 3, "<end>": 4}
    words |= {str(i): i for i in range(5, vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>",
        image_token="<image>", video_token="<video>",
    )  # fmt: skip
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
