"""Trains the quickstart's base model: `python3 examples/quickstart/make_base.py --out DIR`.

Users start RL from a pretrained model, and so does the quickstart. This one is a Qwen2.5-VL by
config with about a million parameters. It is taught two things, never together: to describe clips
(which shapes appear, in order), and to answer a question about a description given as text.
It has not seen a question about a video. Ten minutes on a GPU; the result ships in
`examples/quickstart/base`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from make_tokenizer import DESCRIBE, build, special_ids
from torch import Tensor
from transformers import GenerationConfig, Qwen2_5_VLConfig

from verl.data.preprocess import pixel_values
from verl.data.synthetic import (
    LETTERS,
    QUESTIONS,
    SIDE,
    Event,
    chain,
    make_story,
    options_of,
    render,
)
from verl.models.adapter import get_adapter
from verl.models.policy import PolicyModel, VisionInput
from verl.models.positions import VisualSpan, mrope_positions
from verl.rollout import RolloutRequest, SamplingParams
from verl.rollout.hf_rollout import HFRollout
from verl.sequence_parallel.attention import ATTENTION, PackedAttention, register_attention
from verl.sequence_parallel.packing import Group, pack

logger = logging.getLogger(__name__)
# Share of the steps, frames of a clip, number of events in it.
CURRICULUM = (
    (0.12, 8, (1, 2)),
    (0.15, 16, (1, 2, 3, 4)),
    (0.23, 32, (2, 3, 4, 5, 6)),
    (0.50, 64, (3, 4, 5, 6)),
)


@dataclass(frozen=True)
class Row:
    """One training sequence: text with its placeholder expanded, and how much of it is learnt."""

    ids: list[int]
    n_learnt: int
    frames: Any | None = None


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
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        dtype="bfloat16",
        **special_ids(tokenizer),
    )


class Lessons:
    """Endless training rows from a seed."""

    def __init__(self, tokenizer: Any, config: Qwen2_5_VLConfig, seed: int) -> None:
        self._tokenizer = tokenizer
        self._pad = config.video_token_id
        self._seed = seed

    def clip(self, step: int, i: int, n_frames: int, counts: tuple[int, ...]) -> Row:
        """A clip and its description."""
        rng = random.Random(f"{self._seed}/clip/{step}/{i}")
        events = make_story(rng, n_frames, counts)
        prompt = self._chat(f"<|vision_start|><|video_pad|><|vision_end|>{DESCRIBE}")
        at = prompt.index(self._pad)
        n_visual = n_frames // 2 * (SIDE // 28) ** 2
        prompt = prompt[:at] + [self._pad] * n_visual + prompt[at + 1 :]
        answer = self._answer(describe(events))
        frames = torch.from_numpy(render(events, n_frames)).permute(0, 3, 1, 2)
        return Row(prompt + answer, len(answer), frames)

    def reading(self, step: int, i: int) -> Row:
        """A question about a description that is given; what follows the description is learnt."""
        rng = random.Random(f"{self._seed}/reading/{step}/{i}")
        events = make_story(rng, 64)
        kind = rng.choice(list(QUESTIONS))
        options = options_of(kind, events, rng.choice(LETTERS), rng)
        prompt = self._chat(f"{QUESTIONS[kind]} {' '.join(options)}")
        text = chain(kind, events, options)[0]
        given, learnt = text[: text.index(" so ")], text[text.index(" so ") :]
        answer = self._answer(learnt)
        return Row(prompt + self._ids(given) + answer, len(answer))

    def _chat(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return self._ids(text)

    def _answer(self, text: str) -> list[int]:
        return self._ids(text) + [self._tokenizer.eos_token_id]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def describe(events: list[Event]) -> str:
    """The description a clip is labelled with."""
    return " ".join(f"{i} {event.words()}" for i, event in enumerate(events, start=1))


class Student:
    """The model with its optimizer, on one device."""

    def __init__(
        self, config: Qwen2_5_VLConfig, device: torch.device, lr: float, steps: int, seed: int
    ) -> None:
        register_attention()
        self.adapter = get_adapter(config)
        hf: Any = self.adapter.model_class()(config).float()
        hf.set_attn_implementation({"text_config": ATTENTION})
        self.policy = PolicyModel(hf, self.adapter).to(device)
        self.device = device
        self._video_id = config.video_token_id
        self._spec = self.adapter.vision
        self._noise = torch.Generator(device).manual_seed(seed)
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

    def train(self, rows: list[Row]) -> float:
        """One step on the mean loss of all learnt tokens."""
        row = pack([self._group(r, learn=True) for r in rows]).to(self.device)
        logp, _ = self.policy(
            row.ids_S, row.positions_3S, row.predict_T, row.labels_T,
            features_ME=None, vision=self._vision(rows),
            attention_context=PackedAttention(row.layout, self.device), temperature=1.0,
        )  # fmt: skip
        loss = -logp.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    @torch.no_grad()
    def exact(self, rows: list[Row]) -> float:
        """Share of rows whose learnt part is generated exactly, greedily."""
        requests = []
        for row in rows:
            group = self._group(row, learn=False)
            n = len(row.ids) - row.n_learnt
            vision = self._vision([row])
            features = self.policy.encode(vision.pixels, vision.grids) if vision else None
            requests.append(
                RolloutRequest(group.prompt_ids[:n], group.prompt_positions[:, :n], features, (0,))
            )
        params = SamplingParams(
            max_tokens=max(r.n_learnt for r in rows) + 1, temperature=0.0,
            stop_ids=(rows[0].ids[-1],),
        )  # fmt: skip
        engine = HFRollout(self.policy.hf, self.adapter, self.device, 65536)
        answers = engine.generate(requests, params)
        self.policy.hf.requires_grad_(True).train()
        right = [
            a[0].token_ids.tolist() == r.ids[-r.n_learnt :]
            for a, r in zip(answers, rows, strict=True)
        ]
        return sum(right) / len(rows)

    def _group(self, row: Row, *, learn: bool) -> Group:
        ids = torch.tensor(row.ids)
        spans = []
        if row.frames is not None:
            side = SIDE // 14
            spans = [VisualSpan((len(row.frames) // 2, side, side), 1.0)]
        positions = mrope_positions(ids == self._video_id, spans, merge_size=2, tokens_per_second=1)
        mask = torch.arange(len(ids)) >= len(ids) - row.n_learnt
        return Group(ids, positions, prompt_loss_mask=mask if learn else None)

    def _vision(self, rows: list[Row]) -> VisionInput | None:
        clips = [r.frames for r in rows if r.frames is not None]
        if not clips:
            return None
        # One call for all clips: pixels are made frame by frame, so concatenating them is exact.
        lengths = [len(c) for c in clips]
        pixels: Tensor = pixel_values(torch.cat(clips).to(self.device), self._spec)[0]
        side = SIDE // 14
        patches = torch.tensor([n // 2 * side * side for n in lengths], device=self.device)
        return VisionInput(
            film(pixels, patches, self._noise) if self._noise else pixels,
            [(n // 2, side, side) for n in lengths],
        )


def film(pixels: Tensor, patches: Tensor, generator: torch.Generator) -> Tensor:
    """Normalised pixels as a camera and a codec would change them, from clip to clip.

    A video file shifts colours by a few levels of 256 and adds noise; a model that has only seen
    exact colours reads nothing in it. `patches` holds the number of rows of each clip.
    """
    level = 1 / 68  # of 256 levels, in normalised units

    def uniform(size: float) -> Tensor:
        draw = torch.rand(len(patches), 3, 1, generator=generator, device=pixels.device)
        return ((2 * draw - 1) * size).repeat_interleave(patches, dim=0)

    colours = pixels.view(len(pixels), 3, -1)
    noise = torch.randn(colours.shape, generator=generator, device=pixels.device)
    filmed = colours * (1 + uniform(0.04)) + uniform(6 * level) + noise * 1.5 * level
    return filmed.view_as(pixels)


def stage(step: int, steps: int) -> tuple[int, tuple[int, ...]]:
    """Frames and event counts at a step of the curriculum."""
    done = step / steps
    for share, n_frames, counts in CURRICULUM:
        if done < share:
            return n_frames, counts
        done -= share
    return CURRICULUM[-1][1:]


def save(student: Student, tokenizer: Any, config: Qwen2_5_VLConfig, out: Path) -> None:
    """A Hugging Face folder in bf16."""
    hf: Any = student.policy.hf
    hf.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    ).save_pretrained(out)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": SIDE * SIDE,
        "max_pixels": SIDE * SIDE,
        "image_mean": list(student.adapter.vision.mean),
        "image_std": list(student.adapter.vision.std),
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--clips", type=int, default=48, help="clips a step")
    parser.add_argument("--readings", type=int, default=64, help="text-only questions a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path, help="go on from this model, on whole videos")
    parser.add_argument("--stop", type=int, help="stop and save after this many of the steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(args.seed)
    tokenizer = build()
    config = model_config(tokenizer)
    student = Student(config, torch.device(args.device), args.lr, args.steps, args.seed)
    if args.start:
        student.policy.hf.load_state_dict(
            type(student.policy.hf).from_pretrained(args.start, dtype=torch.float32).state_dict()
        )
    lessons = Lessons(tokenizer, config, args.seed)
    count = sum(p.numel() for p in student.policy.hf.parameters())
    logger.info("%.2f M parameters, %d words, %s", count / 1e6, len(tokenizer), args.device)
    started = time.monotonic()
    for step in range(args.steps):
        n_frames, counts = CURRICULUM[-1][1:] if args.start else stage(step, args.steps)
        rows = [lessons.clip(step, i, n_frames, counts) for i in range(args.clips)]
        rows += [lessons.reading(step, i) for i in range(args.readings)]
        loss = student.train(rows)
        last = step + 1 == min(args.steps, args.stop or args.steps)
        if step % 100 == 99 or last:
            seen = student.exact([lessons.clip(-1 - step, i, n_frames, counts) for i in range(64)])
            read = student.exact([lessons.reading(-1 - step, i) for i in range(64)])
            logger.info(
                "step %4d  %2d frames  loss %.3f  exact: descriptions %.2f, readings %.2f  %4.0f s",
                step + 1, n_frames, loss, seen, read, time.monotonic() - started,
            )  # fmt: skip
        if last:
            break
    save(student, tokenizer, config, args.out)


if __name__ == "__main__":
    main()
