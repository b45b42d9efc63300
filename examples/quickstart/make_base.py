"""Trains the quickstart's base model: `python3 examples/quickstart/make_base.py --out DIR`.

Users start RL from a pretrained model, and so does the quickstart. This one is a Qwen2.5-VL by
config with about a million parameters. It can describe clips (which shapes appear, in order) and
answer a question about a description given as text: `lessons.py`. It has never been asked
to answer a question about a video; when it is, it guesses without looking (27% of the quickstart's
840 test questions, four options each). With its defaults, on one H100 and 16 CPU cores, this takes
4.5 minutes; the result ships in `examples/quickstart/base`. Of held-out clips of 64 frames, out of
mp4 files, 64 of 64 were described exactly; of questions about a given description, 60 of 64 were
answered so, half of them with a clip of another story beside. Another machine gives other weights
in the last digits, since sums on a GPU have no fixed order.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from lessons import GRID_SIDE, Batch, Lessons, Row, clips_for_test
from make_tokenizer import build, special_ids
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Qwen2_5_VLConfig

from verl.data.preprocess import VisionSpec, pixel_values
from verl.data.synthetic import SIDE
from verl.models.adapter import get_adapter
from verl.models.policy import PolicyModel, VisionInput
from verl.models.tower_attention import TOWER_ATTENTION, register_tower_attention
from verl.rollout import RolloutRequest, SamplingParams
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, PackedAttention, register_attention

logger = logging.getLogger(__name__)


def model_config(tokenizer: Any) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL in small: every part is there, each is a few layers thin."""
    text = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 1,
        "in_channels": 3,
        "initializer_range": 0.06,
    }
    settings: dict[str, Any] = {"tie_word_embeddings": True, "dtype": "bfloat16"}
    settings |= special_ids(tokenizer)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **settings)


class Student:
    """The model with its optimizer, on one device."""

    def __init__(
        self, config: Qwen2_5_VLConfig, device: torch.device, lr: float, steps: int
    ) -> None:
        register_attention()
        register_tower_attention()
        self.adapter = get_adapter(config)
        hf: Any = self.adapter.model_class()(config).float()
        hf.set_attn_implementation({"text_config": ATTENTION, "vision_config": TOWER_ATTENTION})
        self.policy = PolicyModel(hf, self.adapter).to(device)
        self.device = device
        self.spec = self.adapter.vision or VisionSpec()
        self._video_id = config.video_token_id
        patches = list(hf.model.visual.patch_embed.parameters())
        ids = {id(p) for p in patches}
        tower = [p for p in hf.model.visual.parameters() if id(p) not in ids]
        ids |= {id(p) for p in tower}
        text = [p for p in hf.parameters() if id(p) not in ids]
        groups = [
            {"params": text, "lr": lr},
            {"params": tower, "lr": lr * 0.25},
            {"params": patches, "lr": lr * 0.05},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: min((s + 1) / 30, 1.0) * (1 - 0.95 * s / steps)
        )

    def train(self, batch: Batch) -> Tensor:
        """One step on the mean loss of all learnt tokens, which is returned."""
        row = batch.row.to(self.device)
        logp, _ = self.policy(
            row.ids_S, row.positions_3S, row.predict_T, row.labels_T,
            features_ME=None, vision=self._vision(batch.frames, batch.lengths),
            attention_context=PackedAttention(row.layout, self.device), temperature=1.0,
        )  # fmt: skip
        loss = -logp.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def exact(self, rows: list[Row]) -> float:
        """Share of rows whose learnt part is generated exactly, greedily."""
        requests = []
        for row in rows:
            group = row.group(self._video_id)
            n = len(row.ids) - row.n_learnt
            features = None
            if row.frames is not None:
                vision = self._vision(row.frames, [len(row.frames)])
                features = self.policy.encode(vision.pixels, vision.grids)
            prompt = group.prompt_ids[:n], group.prompt_positions[:, :n]
            requests.append(RolloutRequest(*prompt, features, (0,)))
        params = SamplingParams(
            max_tokens=max(r.n_learnt for r in rows) + 1, temperature=0.0,
            stop_ids=(rows[0].ids[-1],),
        )  # fmt: skip
        engine = HFRollout(self.policy.hf, self.adapter, self.device, 65536)
        answers = engine.generate(requests, params)
        hf: Any = self.policy.hf
        hf.requires_grad_(True).train()
        right = [
            a[0].token_ids.tolist() == r.ids[-r.n_learnt :]
            for a, r in zip(answers, rows, strict=True)
        ]
        return sum(right) / len(rows)

    def _vision(self, frames: Tensor, lengths: list[int]) -> VisionInput:
        # One call for all clips: pixels are made frame by frame, so concatenating them is exact.
        pixels = pixel_values(frames.to(self.device, non_blocking=True), self.spec)[0]
        return VisionInput(pixels, [(n // 2, GRID_SIDE, GRID_SIDE) for n in lengths])


def save(student: Student, tokenizer: Any, out: Path) -> None:
    """A Hugging Face folder in bf16."""
    hf: Any = student.policy.hf
    hf.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    ).save_pretrained(out)
    shared = {
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": student.spec.patch_size,
        "temporal_patch_size": student.spec.temporal_patch_size,
        "merge_size": student.spec.merge_size,
        "min_pixels": SIDE * SIDE,
        "max_pixels": SIDE * SIDE,
        "image_mean": list(student.spec.mean),
        "image_std": list(student.spec.std),
    }
    for name, kind in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
        ("video_preprocessor_config.json", {"video_processor_type": "Qwen2VLVideoProcessor"}),
    ):
        (out / name).write_text(json.dumps(kind | shared, indent=2) + "\n", encoding="utf-8")


def examine(student: Student, lessons: Lessons, step: int) -> tuple[float, float]:
    """Shares of held-out clips and readings that are answered exactly."""
    stage = lessons.stage(step)
    readings = [lessons.reading(f"test/{i}", *stage, beside=i % 2 == 1) for i in range(64)]
    return student.exact(clips_for_test(lessons, 64, stage)), student.exact(readings)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--clips", type=int, default=64, help="clips a step")
    parser.add_argument("--readings", type=int, default=48, help="questions about texts a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    tokenizer = build()
    config = model_config(tokenizer)
    student = Student(config, torch.device(args.device), args.lr, args.steps)
    lessons = Lessons(
        tokenizer, config.video_token_id,
        seed=args.seed, steps=args.steps, clips=args.clips, readings=args.readings,
    )  # fmt: skip
    count = sum(p.numel() for p in student.policy.hf.parameters())
    logger.info("%.2f M parameters, %d words, %s", count / 1e6, len(tokenizer), args.device)
    started = time.monotonic()
    batches = DataLoader(
        lessons, batch_size=None, num_workers=args.workers, prefetch_factor=4, shuffle=False,
        multiprocessing_context="fork",
    )  # fmt: skip
    for step, batch in enumerate(batches, start=1):
        loss = student.train(batch)
        if step % 100 == 0 or step == args.steps:
            seen, read = examine(student, lessons, step - 1)
            logger.info(
                "step %4d  %2d frames  loss %.3f  exact: descriptions %.2f, readings %.2f  %4.0f s",
                step, lessons.stage(step - 1)[0], loss, seen, read, time.monotonic() - started,
            )  # fmt: skip
    save(student, tokenizer, args.out)


if __name__ == "__main__":
    main()
