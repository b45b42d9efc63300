"""Tiny runs of the real entry points, as a user starts them, and ways to end them early."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import torch
import yaml
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.tiny import tiny_config, write_tiny_model

ROOT = Path(__file__).parents[2]
SECONDS_TO_END = 30
SECONDS_TO_WORK = 240
"""Longest wait for something that a run does; generous, since test machines are shared."""
MARK = "VERL_TEST_RUN"
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 180, 30)}
QUESTIONS = ("what is the first ?", "what is the last ?", "is the answer A ?")
REWARD = '''
"""Different words are good; samples of type `flat` are all worth the same."""

def score(samples, per_word):
    scores = []
    for sample in samples:
        assert sample["video_length"] == 4, "extra columns of the data reach the reward"
        words = len(set(sample["response"].split()))
        flat = sample["problem_type"] == "flat"
        scores.append({"overall": 0.5 if flat else per_word * words, "words": float(words)})
    return scores
'''
NOT_COMPARED = ("timing_s/", "memory/", "perf/", "video/")
"""Metrics of the machine and not of the run."""


class Job:
    """A folder with data, a model and a config, and the command that runs them.

    `out_key` is the setting that says where results go.
    """

    def __init__(
        self,
        folder: Path,
        module: str,
        config: dict[str, Any],
        out_key: str = "trainer.save_checkpoint_path",
    ) -> None:
        self.folder = folder
        self.module = module
        self._out_key = out_key
        self.out = folder / "out"
        self.config = folder / f"{module}.yaml"
        self.config.write_text(yaml.safe_dump(config))

    def start(self, *arguments: str, out: Path | None = None) -> Process:
        """Starts the command; `out` is where its results go."""
        out = out or self.out
        config = (f"config={self.config}", f"{self._out_key}={out}")
        return Process([self.module, *config, *arguments], out, self.folder)

    def finish(self, *arguments: str, out: Path | None = None) -> Process:
        """Runs the command to its end, which must be a good one."""
        process = self.start(*arguments, out=out)
        code = process.wait(SECONDS_TO_WORK)
        assert code == 0, process.text()
        return process


class Process:
    """A started command: what it wrote so far, and all processes that belong to it."""

    def __init__(self, command: list[str], out: Path, folder: Path) -> None:
        self.out = out
        self.mark = uuid.uuid4().hex
        self.log = folder / f"log_{self.mark}.txt"
        env = {**os.environ, MARK: self.mark, "PYTHONDONTWRITEBYTECODE": ""}
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def text(self) -> str:
        """Everything that was printed."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = SECONDS_TO_END) -> int:
        """Exit code; the process and all that it started must end in time."""
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}") from None
        gone = until(lambda: not self.family(), SECONDS_TO_END, every=0.2)
        assert gone, [p.cmdline() for p in self.family()]
        return code

    def family(self) -> list[psutil.Process]:
        """Processes that this one started, directly or not, and that still run."""
        return [p for p in psutil.process_iter() if p.pid != self.popen.pid and self._is_ours(p)]

    def workers(self) -> list[psutil.Process]:
        """The worker processes, by the title that Ray gives to theirs."""
        return [p for p in self.family() if "ray::Host" in " ".join(p.cmdline())]

    def signal(self, signum: int, *, group: bool = False) -> None:
        """Sends a signal to the driver, or to its process group as a terminal does."""
        (os.killpg if group else os.kill)(self.popen.pid, signum)

    def steps(self) -> list[int]:
        """Steps that stand in metrics.jsonl, in order of lines."""
        return [line["step"] for line in lines(self.out / "metrics.jsonl")]

    def wait_for_step(self, step: int) -> None:
        """Returns as soon as the metrics of a step are written."""
        self.until(lambda: self.steps()[-1:] >= [step], f"step {step}")

    def wait_for_save(self, step: int) -> None:
        """Returns while the checkpoint of a step is being written."""
        self.until(lambda: any(self.out.glob(f"global_step_{step}.tmp-*/*")), f"save {step}")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for something that this process does."""
        happened = until(lambda: condition() or self.popen.poll() is not None, SECONDS_TO_WORK)
        assert happened and self.popen.poll() is None, f"no {what}:\n{self.text()}"

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            zombie = process.status() == psutil.STATUS_ZOMBIE
            return not zombie and process.environ().get(MARK) == self.mark
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


def until(condition: Callable[[], bool], seconds: float, every: float = 0.01) -> bool:
    """Polls, fast enough to see a checkpoint being written; whether it happened in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def kill(process: Process) -> None:
    """SIGKILL to the driver; the reaper must end everything else."""
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSON lines file that may be in use; nothing where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def metrics(out: Path) -> dict[int, dict[str, float]]:
    """Metrics by step, those of the machine left out; every step must stand there once."""
    rows = lines(out / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    assert len(set(steps)) == len(steps), steps
    return {
        row["step"]: {k: v for k, v in row["metrics"].items() if not k.startswith(NOT_COMPARED)}
        for row in rows
    }


def undocumented(out: Path) -> set[str]:
    """Metrics of a run of which docs/metrics.md has no row."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/metrics.md").read_text("utf-8"), re.MULTILINE)
    patterns = [name for row in rows for name in re.findall(r"`(.+?)`", row)]
    logged = {name for row in lines(out / "metrics.jsonl") for name in row["metrics"]}
    return {name for name in logged if not any(fnmatchcase(name, p) for p in patterns)}


def write_clip(path: Path, colours: list[str]) -> str:
    """A video of four frames, two of each colour."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for name in colours:
            frame = np.full((64, 64, 3), COLOURS[name], np.uint8)
            for _ in range(2):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    return path.name


def rows(folder: Path, n: int, flat: tuple[int, ...] = ()) -> Iterator[dict[str, Any]]:
    """Questions on clips, every third without one; those at `flat` have a type of that name."""
    names = list(COLOURS)
    for i in range(n):
        colours = [names[i % 3], names[(i // 3) % 3]]
        row = {
            "problem": QUESTIONS[i % 3],
            "answer": f"<answer>{'ABCD'[i % 4]}</answer>",
            "options": ["A. red", "B. blue", "C. green", "D. circle"],
            "problem_type": "flat" if i in flat else ("first", "last")[i % 2],
            "reasoning": f"the first is {colours[0]} the last is {colours[1]}",
            "video_length": 4,
        }
        if i % 3 < 2:
            row["videos"] = write_clip(folder / f"clip{i}.mp4", colours)
        yield row


def write_rows(path: Path, content: Iterator[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


def data_section(folder: Path, train: int, val: int, flat: tuple[int, ...] = ()) -> dict[str, Any]:
    """The `data` section of a config, its files written."""
    files = {}
    for name, n in (("train", train), ("val", val)):
        (folder / name).mkdir(parents=True)
        content = rows(folder / name, n, flat if name == "train" else ())
        files[f"{name}_files"] = write_rows(folder / name / f"{name}_rows.jsonl", content)
    return {
        **files,
        "num_video_frames": 4,
        "video_min_pixels": 56 * 56,
        "video_max_pixels": 56 * 56,
        "max_prompt_length": 64,
        "max_response_length": 24,
        "cache_dir": str(folder / "cache"),
        "num_workers": 1,
    }  # fmt: skip


def rl_job(folder: Path, *, flat: tuple[int, ...] = (), width: int = 32) -> Job:
    """GRPO with all that has state: two optimizer steps a batch, adaptive KL, sampling."""
    (folder / "reward.py").write_text(REWARD)
    model = {
        "model_path": str(write_tiny_model(folder / "model", width=width)),
        "init": "random",
        "enable_gradient_checkpointing": False,
    }
    config = {
        "data": data_section(folder, train=9, val=3, flat=flat)
        | {"rollout_batch_size": 4, "val_batch_size": 2, "max_response_length": 6},
        "algorithm": {"kl_type": "adaptive", "kl_coef": 0.05, "kl_horizon": 20},
        "worker": {
            "actor": {
                "global_batch_size": 2,
                "micro_batch_size_per_device_for_update": 2,
                "model": model,
                "optim": {"lr": 1e-2, "lr_warmup_steps": 2},
            },
            "rollout": {"n": 2, "val_override_config": {"temperature": 0.0, "n": 1}},
            "reward": {
                "reward_function": f"{folder / 'reward.py'}:score",
                "reward_function_kwargs": {"per_word": 0.1},
            },
        },
        "trainer": {
            "total_epochs": 3,
            "max_steps": 6,
            "val_freq": 2,
            "save_freq": 1,
            "device": "cpu",
            "n_gpus_per_node": 2,
        },
    }
    return Job(folder, "verl.trainer.main", config)


def sft_job(folder: Path) -> Job:
    """Supervised fine-tuning on clips and text, packed, with a schedule that ends."""
    config = {
        "data": data_section(folder, train=9, val=3),
        "model": {"model_path": str(write_tiny_model(folder / "model")), "init": "random"},
        "optim": {"lr": 1e-2, "lr_warmup_ratio": 0.5},
        "batch": {"global_batch_size": 4, "max_tokens_per_micro_batch": 128},
        "trainer": {
            "total_epochs": 2,
            "val_freq": 2,
            "save_freq": 1,
            "device": "cpu",
            "n_gpus_per_node": 1,
        },
    }
    return Job(folder, "verl.trainer.sft", config)


def evaluation_job(folder: Path, *, width: int = 32) -> Job:
    """Three ways to ask a model with random weights: as it is, blind, and with fewer frames."""
    path = write_tiny_model(folder / "model", width=width)
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(tiny_config(width=width)).save_pretrained(path)
    data = data_section(folder, train=1, val=12)
    del data["train_files"]
    config = {
        "model_path": str(path),
        "name": "tiny",
        "variants": ["full", "blind", "frames:2"],
        "device": "cpu",
        "data": data | {"val_batch_size": 5},
    }
    return Job(folder, "verl.evaluation.main", config, out_key="output")
