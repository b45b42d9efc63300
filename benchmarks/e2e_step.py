"""A whole RL step on one GPU by three recipes: rollout, rewards, log-probs, update, weight sync.

    python3 benchmarks/e2e_step.py --model 3b --prompts 36k --out FILE.json

One group of G = 8 responses of 1,024 tokens to a question about a video, a model of the real shape
with random weights, vLLM and the trainer's engine in one process as in a worker. Recipes:

    naive  embeddings made anew in every pass, every response with its own prompt, log-probs of the
           old policy and of a reference, as Long-RL's public code does for Qwen models
    mrsp   the same with stored embeddings
    ours   stored embeddings, the prompt once a group, no pass that adds nothing

The rollout is the same in all three but for naive's embeddings: prompts are prefilled once and
shared by the samples. `--replicated N` trains on N of the 8 rows where prompts are replicated, and
takes their time 8/N times (`of_8` says so). The reference is a second model of the same shape: its
pass is timed on the actor.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from plane.common import hardware, save, show, versions
from rollout import GROUP, VIDEOS, Bench
from torch import Tensor
from train_ladder import TEXT_SHAPES

from verl.config import ActorConfig, AlgorithmConfig
from verl.data.media import Frames, MediaItem, MediaRef
from verl.data.preprocess import ResizeRule
from verl.protocol import DataProto
from verl.rollout import SamplingParams
from verl.rollout.vllm_compat import vllm_version
from verl.workers.dp_actor import DataParallelActor, StepTotals
from verl.workers.encoder import MediaEncoder

RECIPES: dict[str, dict[str, bool]] = {
    "naive": {"stored": False, "shared": False},
    "mrsp": {"stored": True, "shared": False},
    "ours": {"stored": True, "shared": True},
}
PATCH = 14


def main(argv: Sequence[str] | None = None) -> None:
    """Command line entry."""
    args = _arguments(argv)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29515")
    on_gpu = args.device == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=0, world_size=1)
    found: dict[str, Any] = {
        "part": "e2e_step",
        "hardware": hardware() | {"gpu": torch.cuda.get_device_name() if on_gpu else None},
        "versions": versions() | {"vllm": vllm_version()},
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "measured": [],
    }
    bench = Step(args)
    for prompt in args.prompts:
        for recipe in args.recipes:
            found["measured"].append(bench.run(prompt, recipe))
            print(found["measured"][-1], flush=True)
            save(args.out, found)
    show(found["measured"])
    sys.stdout.flush()
    os._exit(0)  # an engine that is taken down in a certain order complains of the other


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=TEXT_SHAPES, default="3b")
    parser.add_argument("--prompts", type=names, default=["36k"])
    parser.add_argument("--recipes", type=names, default=["ours", "mrsp", "naive"])
    parser.add_argument("--replicated", type=int, default=GROUP, help="rows to train on")
    parser.add_argument("--response", type=int, default=1024)
    parser.add_argument("--batched", type=int, default=16384, help="max_num_batched_tokens")
    parser.add_argument("--memory", type=float, default=0.35, help="gpu_memory_utilization")
    parser.add_argument("--eager", action="store_true", help="enforce_eager")
    parser.add_argument("--offload-optimizer", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


class Film:
    """Stands for the cache of frames: one film of noise, decoded already."""

    def get(self, ref: MediaRef) -> Frames:
        t, h, w = VIDEOS[ref.key]
        g = torch.Generator().manual_seed(t)
        size = (2 * t, 3, h * PATCH, w * PATCH)
        return Frames(
            torch.randint(0, 256, size, generator=g, dtype=torch.uint8), (0.0,) * 2 * t, 1.0
        )


class Held:
    """Stands for the store: features that were made once."""

    def __init__(self, encoder: MediaEncoder) -> None:
        self._encoder = encoder
        self._made: dict[str, Tensor] = {}

    def prepare(self, items: Any) -> None:
        """All is there."""

    def features(self, items: Sequence[MediaItem]) -> Tensor | None:
        (item,) = items
        if item.ref.key not in self._made:
            features = self._encoder.features(items)
            assert features is not None
            self._made[item.ref.key] = features
        return self._made[item.ref.key]


class Step(Bench):
    """Adds training to the rollout benchmark's two engines."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, has_tower=True, offload_optimizer=args.offload_optimizer)
        film: Any = Film()
        self._live = MediaEncoder(self._engine, film)
        self._held = Held(self._live)
        self._warm_up()

    def _warm_up(self) -> None:
        """Kernels of the lengths to come, of one row where prompts are replicated.

        Above 40,000 tokens a pass takes tens of seconds, and choosing kernels less than one.
        """
        args = self._args
        self._args = argparse.Namespace(**vars(args) | {"replicated": 1, "response": 64})
        for prompt in ("tiny", *args.prompts):
            for recipe in args.recipes if self._tokens(prompt) < 40_000 else ():
                self.run(prompt, recipe)
        self._args = args

    def run(self, prompt: str, recipe: str) -> dict[str, Any]:
        """Seconds of a step's phases."""
        settings = RECIPES[recipe]
        encoder: Any = self._held if settings["stored"] else self._live
        item = self._item(prompt)
        self._held.features([item])  # made before the run, in every recipe
        seconds: dict[str, float] = {}
        request = self._request(prompt, seed=1)
        seconds["encode_s"], features = self._timed(lambda: encoder.features([item]))
        request = replace(request, features=features.to(self._engine.compute_dtype).cpu())
        params = SamplingParams(self._args.response, ignore_eos=True)
        seconds["rollout_s"], outputs = self._timed(
            lambda: self._rollout.generate([request], params)
        )
        batch = self._scored(request.prompt_ids, item, outputs[0], seconds)
        seconds["sleep_s"], _ = self._timed(self._rollout.sleep)
        trained = len(batch) if settings["shared"] else min(len(batch), self._args.replicated)
        of_8 = trained / len(batch)
        self._train(batch.take(range(trained)), encoder, settings["shared"], seconds, of_8)
        seconds["sync_s"] = self._sync()
        found = {"prompt": prompt, "recipe": recipe, "of_8": trained}
        return found | seconds | {"step_s": sum(seconds.values())}

    def _train(
        self, batch: DataProto, encoder: Any, shared: bool, seconds: dict[str, float], of_8: float
    ) -> None:
        """Old and reference log-probs where prompts are replicated, and the update."""
        size = len(batch) if shared else 1
        self._engine._model = replace(
            self._engine._model, keep_attention=shared, trim_last_layer=shared
        )
        actor = DataParallelActor(
            self._engine, encoder,
            ActorConfig(
                shared_prefix=shared, micro_batch_size_per_device_for_update=size,
                micro_batch_size_per_device_for_experience=size,
            ),
            AlgorithmConfig(disable_kl=shared),
        )  # fmt: skip
        for name in () if shared else ("old", "ref"):
            taken, logp = self._timed(partial(actor.log_probs, batch, 1.0))
            seconds[f"{name}_s"] = taken / of_8
            batch = batch.with_columns(**{f"{name}_logp": logp})
        totals = [StepTotals(sum(len(r) for r in batch["response_ids"]), len(batch))]
        taken, _ = self._timed(lambda: actor.update(batch, totals, 1.0))
        seconds["update_s"] = taken / of_8

    def _scored(
        self, prompt_ids: Tensor, item: MediaItem, outputs: Sequence[Any], seconds: dict[str, float]
    ) -> DataProto:
        """The samples with rewards that differ, as advantages of their group."""
        started = time.perf_counter()
        rewards = torch.tensor([float(len(set(o.token_ids.tolist()))) for o in outputs])
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        n = len(outputs)
        columns = {
            "uid": ["question"] * n,
            "prompt_ids": [prompt_ids] * n,
            "media": [(item,)] * n,
            "response_ids": [o.token_ids for o in outputs],
            "advantage": advantage.tolist(),
        }
        seconds["reward_s"] = time.perf_counter() - started
        return DataProto(columns, {"temperature": 1.0, "kl_coef": 0.01})

    def _item(self, prompt: str) -> MediaItem:
        grid = VIDEOS[prompt]
        rule = ResizeRule(min_pixels=56 * 56, max_pixels=56 * 56)
        ref = MediaRef(kind="video", path="/none", sampling=None, resize=rule, key=prompt)
        return MediaItem(ref, grid, 1.0, grid[0] * grid[1] * grid[2] // 4, ())


if __name__ == "__main__":
    main()
