"""Frames a second of the vision tower, and its share of a GPU's bf16 peak.

    python3 benchmarks/video_plane.py encode --model 3b --frames 512 --size 448x448
    torchrun --nproc_per_node=2 benchmarks/video_plane.py encode --model 3b --together-only

First the tower alone, pixels on the device: each variant (plane/tower.py) at each --block-patches.
Then `together`: bytes of frames on the host to features gathered on the host, by all ranks
(`verl.workers.parallel_encode`); one process is a group of one. Seconds are the median of
--repeats after a warm-up, by the clock and of this process's processor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plane import tower
from plane.common import hardware, peak_gb, save, show, versions
from plane.tower import Grid
from verl.data.media import Frames, MediaItem, MediaRef
from verl.data.preprocess import VisionSpec
from verl.models.adapter import Adapter
from verl.workers import encoder as encoder_module
from verl.workers.encode_plan import steps_a_block
from verl.workers.encoder import MediaEncoder, WholeModel
from verl.workers.parallel_encode import ParallelEncoder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(argv: Sequence[str]) -> None:
    """Command line entry; under torchrun only the first rank prints and writes."""
    args = _arguments(argv)
    device, rank = join(args.device)
    grid = _grid(args.frames, args.size)
    hf, adapter = tower.build(args.model, device, DTYPES[args.dtype])
    on_gpu = device.type == "cuda"
    found: dict[str, Any] = {
        "part": "encode",
        "hardware": hardware() | {"gpu": torch.cuda.get_device_name(device) if on_gpu else None},
        "versions": versions(),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "tower": tower.SHAPES[args.model],
        "grid_thw": grid,
        "flops": tower.FORMULA,
        "bf16_peak_flops": tower.bf16_peak(device),
        "measured": [],
    }
    for name in args.variants:
        model = tower.variant(hf, name)
        rows = []
        if not args.together_only:
            rows += _alone(model, adapter, name, grid, device, args)
        if "loop" not in name:
            rows.append(_together(model, adapter, name, grid, device, args))
        found["measured"] += rows
        if name == "ours" and not args.together_only:
            found["milliseconds_by_part"] = _by_part(model, adapter, grid, device, args)
            found["kernels"] = _kernels(model, adapter, grid, device, args)
        if rank == 0:
            save(args.out, found)
    if rank == 0:
        show(found["measured"])
        for key in ("milliseconds_by_part", "kernels"):
            print(key, found.get(key))
    dist.destroy_process_group()


def _alone(
    model: Any, adapter: Adapter, name: str, grid: Grid, device: torch.device, args: Any
) -> list[dict[str, Any]]:
    """The tower alone, for each number of patches a call."""
    rows = []
    run = tower.caller(model, adapter, name)
    if "loop" in name:  # It is slow: less of it says as much.
        grid = (min(grid[0], args.loop_steps), *grid[1:])
    for block_patches in args.block_patches:
        calls = _calls(grid, block_patches)
        pixels = _noise(calls[0], device)

        def once(calls: list[Grid] = calls, pixels: Tensor = pixels) -> None:
            for call in calls:
                run(pixels[: call[0] * call[1] * call[2]], [call])

        row = {"what": "tower", "variant": name, "ranks": 1, "patches_a_call": block_patches}
        rows.append(row | _measured(once, model, calls, device, args, n_gpus=1))
    return rows


def _together(
    model: Any, adapter: Adapter, name: str, grid: Grid, device: torch.device, args: Any
) -> dict[str, Any]:
    """From bytes of frames on the host to gathered features on the host, by all ranks."""
    item = _item(grid)
    engine = WholeModel(model, adapter, device)
    cache: Any = NoisyFrames(grid)
    encoder = MediaEncoder(engine, cache)
    parallel = ParallelEncoder(
        encoder._encode_slices, lambda item, features_ME: True,
        device=device, merge_size=2, block_patches=encoder_module.BLOCK_PATCHES,
    )  # fmt: skip
    world = dist.get_world_size()
    row = {"what": "together", "variant": name, "ranks": world}
    a_call = (encoder_module.BLOCK_PATCHES, encoder_module.PATCHES_PER_CALL)
    row["patches_a_call"] = a_call[device.type == "cuda"]

    def once() -> None:
        parallel.run([item], lambda _: False)

    return row | _measured(once, model, [grid], device, args, n_gpus=world)


def _measured(
    once: Callable[[], None],
    model: Any,
    calls: list[Grid],
    device: torch.device,
    args: Any,
    *,
    n_gpus: int,
) -> dict[str, Any]:
    """Median seconds of `once`, and what follows from them."""
    for _ in range(args.warmups):
        once()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [_timed(once, device) for _ in range(args.repeats)]
    seconds, cpu_seconds = (statistics.median(kind) for kind in zip(*times, strict=True))
    patches = sum(t * h * w for t, h, w in calls)
    rate = sum(tower.flops(model.config.vision_config, [call]) for call in calls) / seconds
    peak = tower.bf16_peak(device) if args.dtype == "bf16" else None
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else peak_gb()
    return {
        "frames": 2 * sum(call[0] for call in calls),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "frames_a_s": 2 * sum(call[0] for call in calls) / seconds,
        "patches_a_s": patches / seconds,
        "tflops": rate / 1e12,
        "share_of_peak": None if peak is None else rate / peak / n_gpus,
        "peak_gb": memory,
    }


def _timed(once: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and of this process's own work: the truer where others work, too."""
    _wait(device)
    dist.barrier()
    started, cpu_started = time.perf_counter(), time.process_time()
    once()
    _wait(device)
    dist.barrier()
    return time.perf_counter() - started, time.process_time() - cpu_started


def _by_part(
    model: Any, adapter: Adapter, grid: Grid, device: torch.device, args: Any
) -> dict[str, float]:
    """Milliseconds of one call by kind of module; waiting after each makes the sum too long."""
    visual = model.model.visual
    parts = {"patch_embed": [visual.patch_embed], "merger": [visual.merger]}
    parts["norms"] = [norm for block in visual.blocks for norm in (block.norm1, block.norm2)]
    parts["attention"] = [block.attn for block in visual.blocks]
    parts["mlp"] = [block.mlp for block in visual.blocks]
    spent: dict[str, float] = defaultdict(float)
    began = 0.0

    def before(*_: Any) -> None:
        nonlocal began
        _wait(device)
        began = time.perf_counter()

    handles = []
    for part, modules in parts.items():

        def after(*_: Any, part: str = part) -> None:
            _wait(device)
            spent[part] += 1e3 * (time.perf_counter() - began)

        for module in modules:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
    run = tower.caller(model, adapter, "ours")
    call = _calls(grid, args.block_patches[-1])[0]
    pixels = _noise(call, device)
    run(pixels, [call])
    spent.clear()
    total = 1e3 * _timed(lambda: (run(pixels, [call]), None)[1], device)[0]
    for handle in handles:
        handle.remove()
    return {"patches": call[0] * call[1] * call[2], "total": total, **spent}


def _kernels(
    model: Any, adapter: Adapter, grid: Grid, device: torch.device, args: Any
) -> dict[str, float]:
    """The longest of the kernels of one call, milliseconds in all; empty without a GPU."""
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    call = _calls(grid, args.block_patches[-1])[0]
    pixels = _noise(call, device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        tower.caller(model, adapter, "ours")(pixels, [call])
        _wait(device)
    events = sorted(profiled.key_averages(), key=lambda e: -e.self_device_time_total)
    return {event.key[:100]: event.self_device_time_total / 1e3 for event in events[:16]}


class NoisyFrames:
    """Stands for a `MediaCache`: frames of noise on the host, sixteen different ones."""

    def __init__(self, grid: Grid) -> None:
        t, h, w = grid
        size = (16, 3, h * tower.PATCH, w * tower.PATCH)
        some = torch.randint(0, 256, size, dtype=torch.uint8)
        n = 2 * t
        self._frames = Frames(some.repeat(-(-n // 16), 1, 1, 1)[:n], (0.0,) * n, 1.0)

    def get(self, ref: MediaRef) -> Frames:
        return self._frames


def _item(grid: Grid) -> MediaItem:
    rule = VisionSpec().resize_rule("video")
    ref = MediaRef("video", "/noise", None, rule, key="noise")
    return MediaItem(ref, grid, 1.0, grid[0] * grid[1] * grid[2] // 4, ())


def _calls(grid: Grid, block_patches: int) -> list[Grid]:
    """A video cut into calls of at most so many patches."""
    steps = min(steps_a_block(grid, block_patches), grid[0])
    return [(min(steps, grid[0] - start), *grid[1:]) for start in range(0, grid[0], steps)]


def _noise(grid: Grid, device: torch.device) -> Tensor:
    return torch.randn(grid[0] * grid[1] * grid[2], tower.PATCH_WIDTH, device=device)


def _grid(n_frames: int, size: str) -> Grid:
    height, width = (int(side) // tower.PATCH for side in size.split("x"))
    if height % 2 or width % 2 or not height or not width:
        raise SystemExit(f"--size {size}: both sides must be multiples of {2 * tower.PATCH}")
    return -(-n_frames // 2), height, width


def join(kind: str) -> tuple[torch.device, int]:
    """This process's device and rank; joins the group of torchrun, or one of its own."""
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        meeting = Path(tempfile.mkdtemp(), "rendezvous")
        dist.init_process_group(backend, init_method=meeting.as_uri(), rank=0, world_size=1)
    return device, dist.get_rank()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "video_plane.py encode", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=tower.SHAPES, default="3b" if on_gpu else "tiny")
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--size", default="448x448", help="height x width of a frame, in pixels")
    parser.add_argument("--block-patches", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--variants", nargs="+", default=["loop", "ours"], help="see plane/tower")
    parser.add_argument("--compile", action="store_true", help="also ours+compile")
    parser.add_argument("--together-only", action="store_true", help="not the tower alone")
    parser.add_argument("--loop-steps", type=int, default=16, help="time steps of variant loop")
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file, best under benchmarks/results")
    args = parser.parse_args(argv)
    if args.compile:
        args.variants.append("ours+compile")
    return args
